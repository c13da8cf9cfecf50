"use strict";

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
let models = [];
let stopping = null;

start();

async function start() {
  $("base").textContent = new URL("v1", location.href).href;
  $("steps").addEventListener("input", () => { $("steps-value").textContent = $("steps").value; });
  $("lora-scale").addEventListener("input", () => { $("lora-scale-value").textContent = $("lora-scale").value; });
  $("model").addEventListener("change", showModel);
  $("lora").addEventListener("change", showStyle);
  $("key").addEventListener("change", () => loadModels());
  $("form").addEventListener("submit", (event) => { event.preventDefault(); generate(read()); });
  $("stop").addEventListener("click", () => stopping?.abort());
  $("reproduce-close").addEventListener("click", () => $("reproduce").close());
  for (const button of document.querySelectorAll("#reproduce .copy")) {
    button.addEventListener("click", () => navigator.clipboard?.writeText($(button.dataset.of).textContent));
  }
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
  });
  await loadModels();
}

async function loadModels(selected = null) {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const answer = await response.json();
    $("key-field").hidden = response.status !== 401 && !$("key").value;
    if (!response.ok) throw new Error(answer.error.message);
    models = answer.data;
    $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    if (models.some((one) => one.id === selected)) $("model").value = selected;
    showModel();
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

function showModel() {
  const model = models.find((one) => one.id === $("model").value);
  if (!model) return;
  $("steps").value = model.num_inference_steps ?? 4;
  $("steps-value").textContent = $("steps").value;
  $("about").textContent = `${model.id} · ${short(model.version ?? "")}`;
  // Of a model that nobody has used yet, it is not known whether it edits: an image may be chosen, and need not be.
  const { references } = model;
  $("images-field").hidden = references === 0;
  $("images").multiple = references !== 1;
  $("images-label").textContent = references > 1 ? `${references} images to edit` : references ? "Image to edit" : "Image, if the model edits";
  const sizes = [["auto", model.size ? model.size.replace("x", "×") : "as trained"]];
  if (model.size) {
    const [width, height] = model.size.split("x").map(Number);
    sizes.push([`${1.5 * width}x${height}`, `${1.5 * width}×${height}`], [`${width}x${1.5 * height}`, `${width}×${1.5 * height}`]);
  }
  $("size").replaceChildren(...sizes.map(([value, text]) => new Option(text, value)));
  $("lora-field").hidden = model.loras.length === 0;
  $("lora").replaceChildren(new Option("none", ""), ...model.loras.map(({ name }) => new Option(name, name)));
  showStyle();
  const most = model.max_teacher_steps;
  $("teacher-field").hidden = most === 0;
  $("teacher-steps").replaceChildren(...[4, 8, 16, 32, 64, 128].filter((n) => n <= most).map((n) => new Option(n, n)));
  $("teacher-steps").value = $("teacher-steps").lastElementChild?.value ?? "";
}

function showStyle() {
  const model = models.find((one) => one.id === $("model").value);
  const style = model.loras.find((one) => one.name === $("lora").value);
  $("lora-scale-field").hidden = !style;
  $("lora-scale").max = style?.max_scale ?? 1;
  $("lora-scale").value = Math.min(1, $("lora-scale").max);
  $("lora-scale-value").textContent = $("lora-scale").value;
}

function read() {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  return {
    prompt: $("prompt").value.trim(), model: $("model").value || null, n: Number($("count").value), seed,
    images: $("images-field").hidden ? [] : [...$("images").files],
    size: $("size").value, num_inference_steps: Number($("steps").value),
    lora: !$("lora-field").hidden && $("lora").value ? [{ name: $("lora").value, scale: Number($("lora-scale").value) }] : [],
    teacherSteps: !$("teacher-field").hidden && $("teacher").checked ? Number($("teacher-steps").value) : 0,
  };
}

async function generate(wish) {
  if (stopping) return;
  if (!wish.prompt) { complain("Write what the images are to show."); return; }
  complain("");
  stopping = new AbortController();
  $("generate").disabled = true;
  $("stop").hidden = false;
  say("Generating…");
  const entry = clone("entry-template");
  entry.querySelector("h3").textContent = wish.prompt;
  entry.querySelector(".references").replaceChildren(...wish.images.map(shown));
  entry.querySelector(".again").addEventListener("click", () => generate(wish));
  $("history-title").hidden = false;
  $("history").prepend(entry);
  const { teacherSteps, ...body } = wish;
  const runs = [run(entry, body, "student")];
  if (teacherSteps) runs.push(run(entry, { ...body, num_inference_steps: teacherSteps }, "teacher"));
  const outcomes = await Promise.allSettled(runs);
  const failure = outcomes.find((outcome) => outcome.status === "rejected")?.reason;
  if (failure?.name === "AbortError") say("Stopped.");
  else if (failure) { complain(failure.message); say(""); }
  else say(`Done: ${outcomes.map((outcome) => outcome.value).join("; ")}.`);
  entry.querySelectorAll("figure.empty").forEach((figure) => figure.remove());
  if (!entry.querySelector("figure")) entry.remove();
  $("history-title").hidden = !$("history").childElementCount;
  const used = models.find((one) => one.id === $("model").value);
  if (used && used.references === null && !failure) await loadModels(used.id);  // now its size is known, too
  stopping = null;
  $("generate").disabled = false;
  $("stop").hidden = true;
}

/** One request; its images appear in the entry while they form. Gives a sentence about it. */
async function run(entry, body, sampler) {
  const strip = clone("strip-template");
  strip.querySelector("h4").textContent =
    `${sampler}, ${body.num_inference_steps} ${sampler === "teacher" ? "steps" : body.num_inference_steps === 1 ? "evaluation" : "evaluations"}`;
  const figures = Array.from({ length: body.n }, (_, index) => {
    const figure = clone("image-template");
    figure.querySelector("figcaption").textContent = `seed ${body.seed + index}`;
    return figure;
  });
  strip.querySelector(".images").replaceChildren(...figures);
  entry.querySelector(".strips").append(strip);
  const begin = performance.now();
  const response = await fetch(endpoint(body), { method: "POST", signal: stopping.signal, ...content({ ...body, sampler, stream: true }) });
  if (!response.ok) {
    const { error } = await response.json();
    if (response.status === 401) $("key-field").hidden = false;
    throw new Error(error.message);
  }
  let last = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const figure = figures[event.index];
    const source = `data:image/${event.output_format};base64,${event.b64_json}`;
    const image = figure.querySelector("img");
    image.src = source;
    figure.classList.remove("empty");
    if (event.type.endsWith(".completed")) {
      last = event;
      const [width, height] = event.size.split("x").map(Number);
      [image.width, image.height] = [width, height];
      image.alt = `${body.prompt}, seed ${event.seed}, by the ${sampler}`;
      image.classList.toggle("pixels", width < 48);
      figure.querySelector("a").href = source;
      figure.querySelector("a").download = `${body.prompt.replace(/[^\w]+/g, "-").slice(0, 40)}-${event.seed}.png`;
      figure.querySelector("progress").remove();
      const link = figure.querySelector(".reproduce");
      link.hidden = false;
      link.addEventListener("click", () => reproduce(body, sampler, event));
    } else {
      figure.querySelector("progress").value = (event.partial_image_index + 1) / event.num_inference_steps;
    }
  }
  const milliseconds = Math.round(performance.now() - begin);
  const network = Math.round(last.timings.network_ms);
  strip.querySelector(".facts").textContent =
    `${milliseconds} ms, of which ${network} in the network · batch of ${Math.round(last.batch_size)} · ${last.model} ${short(last.version)}`;
  return `${sampler} in ${milliseconds} ms`;
}

function endpoint({ images }) { return images.length ? "v1/images/edits" : "v1/images/generations"; }

/** Headers and body of a request: JSON, or for an edit the form that takes files. */
function content({ images, ...fields }) {
  if (!images.length) return { headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(fields) };
  const form = new FormData();
  for (const [name, value] of texts(fields)) form.append(name, value);
  for (const image of images) form.append("image", image);
  return { headers: headers(), body: form };
}

/** The fields of an edit's form beside its images. */
function texts(fields) {
  return Object.entries({ ...fields, lora: JSON.stringify(fields.lora) }).filter(([, value]) => value !== null);
}

function shown(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  return image;
}

/** Show how to draw one image again, by command and by curl: another seed or number of images changes nothing of it. */
function reproduce(body, sampler, event) {
  const model = models.find((one) => one.id === event.model);
  // The exact version, where it has an address of its own; an alias may have moved since.
  const source = event.version.startsWith("models:") ? event.version : model?.source ?? event.model;
  const steps = sampler === "teacher" ? "--teacher-steps" : "--steps";
  const styles = body.lora.map(({ name, scale }) => ` --lora ${quoted(`${model.loras.find((one) => one.name === name).source}:${scale}`)}`);
  const files = body.images.map(({ name }) => quoted(name));
  $("reproduce-command").textContent =
    `jobs/generate.py --model ${quoted(source)} --prompt ${quoted(body.prompt)}` + files.map((name) => ` --image ${name}`).join("") +
    ` ${steps} ${body.num_inference_steps} --seed ${event.seed}` + styles.join("");
  // Commands draw images of the size that a model was trained at.
  $("reproduce-by-command").hidden = body.size !== "auto";
  const wish = {
    model: event.model, prompt: body.prompt, seed: event.seed, num_inference_steps: body.num_inference_steps,
    size: body.size, lora: body.lora, sampler,
  };
  const key = $("key").value ? ` -H "authorization: Bearer $FEWSTEP_API_KEY"` : "";
  const save = "import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)[\"data\"][0][\"b64_json\"]))";
  const sent = files.length
    ? [...files.map((name) => `-F image=@${name}`), ...texts(wish).map(([name, value]) => `-F ${quoted(`${name}=${value}`)}`)].join(" ")
    : `-H 'content-type: application/json' \\\n  -d ${quoted(JSON.stringify(wish))}`;
  $("reproduce-curl").textContent =
    `curl -s ${new URL(endpoint(body), location.href).href}${key} ${sent} \\\n  | python3 -c '${save}' > image.png`;
  $("reproduce").showModal();
}

/** As one word of a shell. */
function quoted(text) { return `'${text.replaceAll("'", `'\\''`)}'`; }

/** The data of server-sent events, as objects. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function headers() { return $("key").value ? { authorization: `Bearer ${$("key").value}` } : {}; }
function short(version) { return version.replace(/^sha256:(.{8}).*/, "$1").replace(/^models:\/.*\//, "version "); }
function say(text) { $("status").textContent = text; }
function complain(text) { $("error").textContent = text; $("error").hidden = !text; }
