// The miniature in this browser: its graphs run by onnxruntime-web, its tokenizer and solver in plain JavaScript.

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { readAdapter } from "./adapter.js";
import { Noise } from "./noise.js";
import { Solver } from "./solver.js";
import { Tokenizer } from "./tokenizer.js";

const RUNTIME = "ort/ort-wasm-simd-threaded.wasm.gz"; // compressed, a quarter of its size
const GRAPHS = ["text_encoder", "unet", "decoder"];

/** Fetch files side by side, name -> ArrayBuffer; `tell(share)` gets how much of their bytes has arrived. */
async function download(names, tell) {
  const responses = await Promise.all(names.map((name) => fetch(new URL(name, import.meta.url))));
  const failed = responses.find((response) => !response.ok);
  if (failed) throw new Error(`${failed.url} cannot be fetched (${failed.status}).`);
  const total = responses.reduce((sum, response) => sum + Number(response.headers.get("Content-Length")), 0);
  let received = 0;
  const read = async (response) => {
    const transform = (chunk, controller) => {
      received += chunk.byteLength;
      tell(Math.min(received / total, 1)); // a server that compresses on its way says a smaller total
      controller.enqueue(chunk);
    };
    return new Response(response.body.pipeThrough(new TransformStream({ transform }))).arrayBuffer();
  };
  const buffers = await Promise.all(responses.map(read));
  return Object.fromEntries(names.map((name, i) => [name, buffers[i]]));
}

const json = (buffer) => JSON.parse(new TextDecoder().decode(buffer));

/** What a gzip file holds; some servers have unpacked it on its way already. */
async function gunzip(buffer) {
  const [first, second] = new Uint8Array(buffer, 0, 2);
  if (first !== 0x1f || second !== 0x8b) return buffer;
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const product = (dims) => dims.reduce((a, b) => a * b, 1);

function joined(first, second) {
  const both = new Float32Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

const float = (data, dims) => new ort.Tensor("float32", data, dims);

export class Model {
  /** Download and start everything. */
  static async load(tell) {
    const model = new Model();
    const graph = (name) => `model/${name}.onnx`;
    const [description, tokenizer, adapter] = ["model.json", "tokenizer.json", "adapter.safetensors"].map(
      (f) => `model/${f}`,
    );
    const files = await download([description, tokenizer, adapter, RUNTIME, ...GRAPHS.map(graph)], tell);
    // Threads need a page that is isolated from other origins, which few servers ask for.
    ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
    ort.env.wasm.wasmBinary = await gunzip(files[RUNTIME]);
    for (const name of GRAPHS) {
      model[name] = await ort.InferenceSession.create(new Uint8Array(files[graph(name)]), {
        executionProviders: ["wasm"],
      });
    }
    model.description = json(files[description]);
    model.tokenizer = new Tokenizer(json(files[tokenizer]), model.description.tokenizer);
    model.setAdapter(files[adapter]);
    return model;
  }

  /** Draw with another adapter file from now on. Throws an Error that says why it does not fit. */
  setAdapter(buffer) {
    const inputs = Object.entries(readAdapter(buffer, this.description.adapter));
    this.adapter = Object.fromEntries(inputs.map(([name, { dims, data }]) => [name, float(data, dims)]));
  }

  async encode(prompt) {
    const ids = this.tokenizer.encode(prompt);
    return (await this.text_encoder.run({ ids: new ort.Tensor("int32", ids, [1, ids.length]) })).output;
  }

  /** Latents -> RGB bytes, row by row. */
  async decode(latents) {
    const { output } = await this.decoder.run({ latents: float(latents, [1, ...this.description.latents]) });
    const [, , height, width] = output.dims;
    const size = height * width;
    const pixels = Uint8Array.from({ length: 3 * size }, (_, i) =>
      Math.round(255 * output.data[(i % 3) * size + Math.floor(i / 3)]),
    );
    return { width, height, pixels };
  }

  /**
   * Draw one picture as diffusers does: {width, height, pixels}.
   *
   * `noise` is the initial latents, from which DPM-Solver++ draws without further noise; or the initial latents and as
   * many numbers more for each step, and then, as with a seed alone, it draws with fresh noise at each step. A seed
   * gives what `torch.Generator().manual_seed(seed)` gives. `onStep(step, look)` may be async, and what it throws ends
   * the drawing; `await look()` is the picture as it stands, which takes half as long as the step itself.
   */
  async draw({ prompt, seed = 0, steps, guidance, strength, noise }, onStep = () => {}) {
    const { latents: dims, defaults, schedule } = this.description;
    ({ steps, guidance, strength } = { ...defaults, ...defined({ steps, guidance, strength }) });
    const size = product(dims);
    if (Array.isArray(noise)) noise = noise.flat(Infinity);
    const stochastic = noise == null || noise.length !== size;
    const solver = new Solver(schedule, steps, stochastic);
    if (typeof prompt !== "string") throw new TypeError("prompt must be a text.");
    for (const [name, value] of Object.entries({ guidance, strength })) {
      if (!Number.isFinite(value)) throw new RangeError(`${name}=${value} must be a number.`);
    }
    if (noise != null && stochastic && noise.length !== size * (1 + steps)) {
      throw new RangeError(
        `noise has ${noise.length} numbers and should have ${size}, or ${size * (1 + steps)} for ${steps} steps.`,
      );
    }
    const generator = noise == null ? new Noise(seed) : null;
    const normal = (index) =>
      generator?.normal(size) ?? Float32Array.from(noise.slice(index * size, (index + 1) * size));

    const [empty, wanted] = [await this.encode(""), await this.encode(prompt)];
    const states = float(joined(empty.data, wanted.data), [2, ...wanted.dims.slice(1)]);
    const fixed = { ...this.adapter, states, strength: float([strength], []) };
    let latents = normal(0);
    let look;
    for (const [index, timestep] of solver.timesteps.entries()) {
      const sample = float(joined(latents, latents), [2, ...dims]);
      const { output } = await this.unet.run({ ...fixed, sample, timestep: float([timestep], []) });
      const [without, withPrompt] = [output.data.subarray(0, size), output.data.subarray(size)];
      // Classifier-free guidance (Ho and Salimans, 2022); at 1 and below there is none.
      const guided = guidance > 1 ? without.map((value, k) => value + guidance * (withPrompt[k] - value)) : withPrompt;
      const { latents: next, clean } = solver.step(guided, latents, stochastic ? normal(index + 1) : null);
      latents = next;
      let picture;
      look = async () => (picture ??= await this.decode(clean));
      await onStep(index + 1, look);
    }
    return look(); // after the last step no noise is left: what the UNet sees is the picture
  }
}

const defined = (options) => Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
