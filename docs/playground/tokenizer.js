// CLIP's tokenizer, read from a `tokenizer.json`: lower case, pieces, byte-pair merges (Sennrich et al., 2016).

const WORD = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
const END_OF_WORD = "</w>";

/** Byte -> the letter that stands for it in a vocabulary: the printable ones for themselves, the others from 256 on. */
function byteLetters() {
  const printable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}

export class Tokenizer {
  /** `file` is the parsed `tokenizer.json`; `settings` holds `length` and the ids `start`, `end`, `padding`. */
  constructor(file, settings) {
    this.settings = settings;
    this.vocabulary = new Map(Object.entries(file.model.vocab));
    this.unknown = this.vocabulary.get(file.model.unk_token);
    this.ranks = new Map(file.model.merges.map((pair, rank) => [[].concat(pair).join(" "), rank]));
    this.special = new Map(file.added_tokens.map(({ content, id }) => [content, id]));
    const escaped = [...this.special.keys()].map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.split = new RegExp(`(${escaped.join("|")})`);
    this.letters = byteLetters();
  }

  /** A prompt's ids: start, the pieces, end, padding; as many as the text encoder reads. */
  encode(prompt) {
    const { length, start, end, padding } = this.settings;
    const ids = [start, ...this.pieces(prompt).slice(0, length - 2), end];
    return Int32Array.from({ length }, (_, i) => ids[i] ?? padding);
  }

  pieces(prompt) {
    return prompt.split(this.split).flatMap((part) => {
      if (this.special.has(part)) return [this.special.get(part)];
      const words = part.normalize("NFC").replace(/\s+/g, " ").toLowerCase().match(WORD) ?? [];
      return words.flatMap((word) => this.word(word));
    });
  }

  /** One word's ids: of all neighbours that are a merge, the earliest merge comes first. */
  word(word) {
    const symbols = Array.from(new TextEncoder().encode(word), (byte) => this.letters[byte]);
    symbols[symbols.length - 1] += END_OF_WORD;
    for (;;) {
      const ranks = symbols.slice(1).map((right, i) => this.ranks.get(`${symbols[i]} ${right}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) break;
      const at = ranks.indexOf(best);
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
    }
    return symbols.map((symbol) => this.vocabulary.get(symbol) ?? this.unknown);
  }
}
