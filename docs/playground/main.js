// The page: controls in, pictures out. Other programs use `window.dbnb.ready` and `window.dbnb.draw(options)`.

import { Client } from "./client.js";

const $ = (id) => document.getElementById(id);
const PAUSE = 250; // ms without a change before a new drawing starts
const MAX_SEED = 2 ** 32;

/** Why this browser cannot draw; "" where it can. */
function missing() {
  if (typeof WebAssembly === "undefined") return "WebAssembly";
  if (typeof DecompressionStream === "undefined") return "DecompressionStream";
  // A function that makes a vector of zeros: only what knows SIMD finds it valid.
  const simd = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw==";
  const bytes = Uint8Array.from(atob(simd), (letter) => letter.charCodeAt(0));
  return WebAssembly.validate(bytes) ? "" : "SIMD instructions in WebAssembly";
}

function show(canvas, { width, height, pixels }) {
  const image = new ImageData(width, height);
  image.data.fill(255);
  for (let i = 0; i < width * height; i++) image.data.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

const escaped = (text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");

/** The prompt with the identifier before the class word, or with an article instead. */
function withIdentifier(prompt, { identifier, class_word: noun }, wanted) {
  const bare = new RegExp(`(?:\\b(?:an?|the) )?\\b(${escaped(noun)})\\b`, "i");
  const named = new RegExp(`(\\b(?:an?|the) (?:(?!of\\b)\\w+ )*)?\\b${escaped(identifier)} `, "gi");
  return wanted ? prompt.replace(bare, `${identifier} $1`) : prompt.replace(named, (_, article) => article ?? "a ");
}

/** The prompt with its place, if it has one, replaced by another. */
function withPlace(prompt, places, place) {
  const old = places.find((phrase) => prompt.includes(phrase));
  return old ? prompt.replace(old, place) : `${prompt.trimEnd()} ${place}`;
}

function start() {
  const lacks = missing();
  if (lacks) throw new Error(`it lacks ${lacks}`);
  $("status").textContent = "Loading the model …";
  const percent = (share) => Math.floor(100 * share);
  return new Client(
    (share) => ($("status").textContent = share < 1 ? `Loading the model: ${percent(share)} %` : "Starting …"),
  );
}

function page(client, { defaults, subject, kinds, places }) {
  const value = (id) => Number($(id).value);
  let drawing = new AbortController();
  let pause;

  function label() {
    for (const id of ["strength", "guidance", "steps"]) {
      document.querySelector(`label[for="${id}"] output`).textContent = value(id);
    }
    $("identifier").checked = new RegExp(`\\b${escaped(subject.identifier)}\\b`, "i").test($("prompt").value);
  }

  /** What is being drawn is not wanted any more; until something is, the picture is marked as busy. */
  function outdated() {
    clearTimeout(pause);
    drawing.abort();
    $("canvas").setAttribute("aria-busy", true);
  }

  function settled(caption) {
    $("caption").textContent = caption;
    $("canvas").setAttribute("aria-busy", false);
  }

  async function draw() {
    outdated();
    drawing = new AbortController();
    const { signal } = drawing;
    const numbers = ["seed", "steps", "guidance", "strength"].map((id) => [id, value(id)]);
    const options = { prompt: $("prompt").value, ...Object.fromEntries(numbers) };
    const started = performance.now();
    const onStep = (step, picture) => {
      if (signal.aborted) return;
      show($("canvas"), picture);
      while ($("film").children.length >= step) $("film").lastChild.remove();
      const frame = document.createElement("canvas");
      frame.setAttribute("role", "img");
      frame.setAttribute("aria-label", `After step ${step}`);
      show(frame, picture);
      $("film").append(frame);
      $("caption").textContent = `step ${step} of ${options.steps}`;
    };
    try {
      await client.draw(options, { onStep, signal });
      if (signal.aborted) return;
      $("canvas").setAttribute("aria-label", `The picture of: ${options.prompt}`);
      settled(`${options.steps} steps in ${((performance.now() - started) / 1000).toFixed(1)} seconds`);
    } catch (error) {
      if (!signal.aborted) settled(error.message);
    }
  }

  function soon() {
    label();
    outdated();
    pause = setTimeout(draw, PAUSE);
  }

  function edit(prompt) {
    $("prompt").value = prompt;
    soon();
  }

  for (const [id, initial] of Object.entries(defaults)) $(id).value = initial;
  $("seed").value = 0;
  $("prompt").value = `a photo of ${subject.identifier} ${subject.class_word}`;
  document.querySelector("#identifier + span code").textContent = subject.identifier;
  for (const place of places) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: place });
    button.onclick = () => edit(withPlace($("prompt").value, places, place));
    $("places").append(button);
  }
  $("kinds").textContent = kinds.join(", ");
  $("identifier").onchange = ({ target }) => edit(withIdentifier($("prompt").value, subject, target.checked));
  $("another").onclick = () => {
    $("seed").value = Math.floor(Math.random() * MAX_SEED);
    soon();
  };
  $("adapter").onchange = async ({ target }) => {
    const [file] = target.files;
    if (!file) return; // the dialogue was closed
    outdated();
    try {
      await client.setAdapter(await file.arrayBuffer());
      soon();
    } catch (error) {
      settled(`${file.name} cannot be drawn with: ${error.message}.`);
    }
  };
  for (const id of ["prompt", "strength", "guidance", "steps", "seed"]) $(id).oninput = soon;
  $("controls").onsubmit = (event) => {
    event.preventDefault();
    draw();
  };
  $("status").hidden = true;
  $("controls").hidden = false;
  label();
  return draw();
}

async function main() {
  try {
    const client = start();
    // Ready when the first picture is there: whoever measures a drawing then measures no other.
    const ready = client.ready.then((description) => page(client, description));
    window.dbnb = { ready, draw: (options) => client.draw(options) };
    await ready;
  } catch (error) {
    $("status").textContent = `This browser cannot draw here: ${error.message.replace(/\.$/, "")}.`;
    window.dbnb ??= { ready: Promise.reject(error), draw: () => Promise.reject(error) };
    window.dbnb.ready.catch(() => {}); // it is said on the page
  }
}

main();
