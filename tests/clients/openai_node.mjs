// OpenAI's package for Node on the service: images, edits, streams, models, errors.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const require = createRequire(process.env.NODE_FOLDER + "/"); // the package lies in a folder of its own
const { default: OpenAI, toFile } = require("openai");
const { version } = JSON.parse(readFileSync(`${process.env.NODE_FOLDER}/node_modules/openai/package.json`));
const base = process.env.FEWSTEP_ADDRESS;
const picture = readFileSync(`${process.env.NODE_FOLDER}/picture.png`);
const prompt = "red heart, noto style";
const seed = 7;
let failed = false;

function check(what, holds, seen = "") {
  console.log(`  ${holds ? "ok  " : "FAIL"} ${what}${holds ? "" : `: ${seen?.stack ?? JSON.stringify(seen)?.slice(0, 500)}`}`);
  failed ||= !holds;
}

async function raised(call) {
  try {
    await call();
  } catch (error) {
    return error;
  }
}

async function all(stream) {
  const events = [];
  for await (const event of await stream) events.push(event);
  return events;
}

const file = (content = picture, name = "a.png") => toFile(content, name, { type: "image/png" });
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

console.log(`openai ${version} (Node ${process.versions.node})`);
const client = new OpenAI({ baseURL: base, apiKey: "sesame" });
const plain = await fetch(`${base}/images/generations`, {
  method: "POST",
  headers: { "content-type": "application/json", authorization: "Bearer sesame" },
  body: JSON.stringify({ prompt, seed, n: 2 }),
});
const expected = (await plain.json()).data.map((image) => image.b64_json);

let result = await client.images.generate({ model: "emoji-student", prompt, n: 2, size: "16x16", seed });
check("generates", same(result.data.map((image) => image.b64_json), expected), result);
// Who leaves a field open may write null.
const open = { model: null, n: null, size: null, quality: null, background: null, style: null, stream: null };
result = await client.images.generate({ prompt, seed, ...open, moderation: null, response_format: null });
check("leaves fields open", result.data[0].b64_json === expected[0], result);
result = await client.images.generate({ prompt, seed, response_format: "url" });
const fetched = await fetch(result.data[0].url);
check("fetches by address", Buffer.from(await fetched.arrayBuffer()).toString("base64") === expected[0], result);

let events = await all(client.images.generate({ prompt, seed, stream: true, partial_images: 2 }));
const kinds = events.map((event) => event.type);
check("streams", same(kinds, ["image_generation.partial_image", "image_generation.partial_image", "image_generation.completed"]), kinds);
check("streams the same image", events.at(-1).b64_json === expected[0]);

result = await client.images.edit({ model: "editor", prompt, image: await file(), n: 2, size: "16x16", seed });
const edited = result.data.map((image) => image.b64_json);
check("edits", edited.length === 2 && edited[0] !== edited[1], result);
result = await client.images.edit({ model: "editor", prompt, image: [await file()], seed, response_format: "url" });
check("edits a list, to an address", result.data[0].url.startsWith("http") && !result.data[0].b64_json, result);
events = await all(client.images.edit({ model: "editor", prompt, image: await file(), stream: true, partial_images: 1 }));
check("streams edits", same(events.map((event) => event.type), ["image_edit.partial_image", "image_edit.completed"]), events);

check("lists models", same((await all(client.models.list())).map((model) => model.id), ["emoji-student", "editor"]));
check("asks for one", (await client.models.retrieve("editor")).owned_by === "fewstep");

let error = await raised(() => client.images.generate({ prompt, n: 99 }));
check("400", error instanceof OpenAI.BadRequestError && error.param === "n" && /at most 10/.test(error.message), error);
error = await raised(() => client.images.generate({ prompt, n: 99, stream: true }));
check("400 of a stream", error instanceof OpenAI.BadRequestError, error);
error = await raised(() => client.images.generate({ prompt, model: "nope" }));
check("404", error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
const stranger = new OpenAI({ baseURL: base, apiKey: "a key that nobody has" });
error = await raised(() => stranger.images.generate({ prompt }));
check("401", error instanceof OpenAI.AuthenticationError, error);
// Uploads that are refused before they are read: the answer must reach a client that still sends.
error = await raised(async () => stranger.images.edit({ prompt, image: await file(Buffer.alloc(8 * 2 ** 20)) }));
check("401 of a large upload", error instanceof OpenAI.AuthenticationError, error);
error = await raised(async () => client.images.edit({ prompt, image: await file(Buffer.alloc(40 * 2 ** 20)) }));
check("413 of a larger one", error?.status === 413, error);
error = await raised(async () => client.images.createVariation({ image: await file(Buffer.alloc(8 * 2 ** 20)) }));
check("variations are 404", error instanceof OpenAI.NotFoundError, error);
process.exit(failed ? 1 : 0);
