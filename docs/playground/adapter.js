// Adapter files: `pytorch_lora_weights.safetensors`, as dbnb and diffusers write it.

/** A safetensors file's header, and where what follows it starts. */
function header(buffer) {
  try {
    const size = Number(new DataView(buffer).getBigUint64(0, true));
    return [JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size))), 8 + size];
  } catch {
    throw new Error("it is no safetensors file");
  }
}

/** Files that adapt attention alone call the halves down and up; the graph calls them A and B. */
const canonical = (name) => name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.");

/** Name -> {dims, data}, and the settings that diffusers keeps in the header. */
function parse(buffer) {
  const [{ __metadata__: metadata = {}, ...entries }, offset] = header(buffer);
  const tensors = Object.entries(entries).map(([name, { dtype, shape, data_offsets: range }]) => {
    if (dtype !== "F32") throw new Error(`tensor ${name} is ${dtype}, and should be F32`);
    const bytes = buffer.slice(offset + range[0], offset + range[1]);
    return [canonical(name), { dims: shape, data: new Float32Array(bytes) }];
  });
  return { tensors: new Map(tensors), settings: JSON.parse(metadata.lora_adapter_metadata ?? "{}") };
}

/** What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA (Kalajdzievski, 2023). */
function scale(settings) {
  const { "unet.r": rank, "unet.lora_alpha": alpha, "unet.use_rslora": stabilised } = settings;
  if (!rank || !alpha) throw new Error("its rank and alpha are not in the file");
  return alpha / (stabilised ? Math.sqrt(rank) : rank);
}

/** `data` of shape `from`, with zeros up to shape `to`: a lower rank is a higher one whose further rows are zero. */
function padded(name, { dims: from, data }, to) {
  const rank = name.includes(".lora_A.") ? 0 : 1;
  if (from.length !== to.length || from.some((n, axis) => (axis === rank ? n > to[axis] : n !== to[axis]))) {
    throw new Error(`tensor ${name} is ${from.join(" x ")}, and here at most ${to.join(" x ")} fits`);
  }
  const result = new Float32Array(to.reduce((a, b) => a * b, 1));
  if (rank === 0) result.set(data);
  else for (let row = 0; row < to[0]; row++) result.set(data.subarray(row * from[1], (row + 1) * from[1]), row * to[1]);
  return result;
}

/**
 * An adapter file's bytes -> what the UNet's graph takes, name -> {dims, data}.
 *
 * `shapes` are the graph's own, name -> dims. Layers that the file does not have stay as the base has them. Throws an
 * Error that says why the file does not fit.
 */
export function readAdapter(buffer, shapes) {
  const { tensors, settings } = parse(buffer);
  const strange = [...tensors.keys()].find((name) => !(name in shapes));
  if (strange) throw new Error(`this page has no place for ${strange}`);
  const factor = scale(settings);
  const inputs = Object.entries(shapes).map(([name, dims]) => {
    const tensor = tensors.get(name);
    const data = tensor ? padded(name, tensor, dims) : new Float32Array(dims.reduce((a, b) => a * b, 1));
    return [name, { dims, data: name.includes(".lora_B.") ? data.map((value) => factor * value) : data }];
  });
  return Object.fromEntries(inputs);
}
