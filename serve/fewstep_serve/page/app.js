"use strict";

const $ = (id) => document.getElementById(id);
const clone = (id) => $(id).content.firstElementChild.cloneNode(true);
let models = [];
let stopping = null;

start();

async function start() {
  $("base").textContent = new URL("v1", location.href).href;
  $("steps").addEventListener("input", () => { $("steps-value").textContent = $("steps").value; });
  $("model").addEventListener("change", showModel);
  $("key").addEventListener("change", loadModels);
  $("form").addEventListener("submit", (event) => { event.preventDefault(); generate(read()); });
  $("stop").addEventListener("click", () => stopping?.abort());
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("form").requestSubmit(); }
  });
  await loadModels();
}

async function loadModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const answer = await response.json();
    $("key-field").hidden = response.status !== 401 && !$("key").value;
    if (!response.ok) throw new Error(answer.error.message);
    models = answer.data;
    $("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
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
  const sizes = [["auto", model.size ? model.size.replace("x", "×") : "as trained"]];
  if (model.size) {
    const [width, height] = model.size.split("x").map(Number);
    sizes.push([`${1.5 * width}x${height}`, `${1.5 * width}×${height}`], [`${width}x${1.5 * height}`, `${width}×${1.5 * height}`]);
  }
  $("size").replaceChildren(...sizes.map(([value, text]) => new Option(text, value)));
  const most = model.max_teacher_steps;
  $("teacher-field").hidden = most === 0;
  $("teacher-steps").replaceChildren(...[4, 8, 16, 32, 64, 128].filter((n) => n <= most).map((n) => new Option(n, n)));
  $("teacher-steps").value = $("teacher-steps").lastElementChild?.value ?? "";
}

function read() {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  return {
    prompt: $("prompt").value.trim(), model: $("model").value || null, n: Number($("count").value), seed,
    size: $("size").value, num_inference_steps: Number($("steps").value),
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
  const response = await fetch("v1/images/generations", {
    method: "POST", signal: stopping.signal, headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, sampler, stream: true }),
  });
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
    if (event.type === "image_generation.completed") {
      last = event;
      [image.width, image.height] = event.size.split("x").map(Number);
      image.alt = `${body.prompt}, seed ${event.seed}, by the ${sampler}`;
      figure.querySelector("a").href = source;
      figure.querySelector("a").download = `${body.prompt.replace(/[^\w]+/g, "-").slice(0, 40)}-${event.seed}.png`;
      figure.querySelector("progress").remove();
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
