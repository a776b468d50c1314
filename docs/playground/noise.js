// Normal numbers from a seed, the same as `torch.randn(..., generator=torch.Generator().manual_seed(seed))` on a CPU.

const SIZE = 624;
const OFFSET = 397;

/** The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998). */
class Twister {
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = seed;
    for (let i = 1; i < SIZE; i++) {
      const previous = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, previous) + i;
    }
    this.index = SIZE;
  }

  twist() {
    const { state } = this;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + OFFSET) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.index = 0;
  }

  /** 32 random bits. */
  next() {
    if (this.index === SIZE) this.twist();
    let y = this.state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }
}

const BLOCK = 16; // torch's: eight uniform numbers and eight more give eight pairs of normal ones

export class Noise {
  constructor(seed) {
    if (!Number.isInteger(seed) || seed < 0 || seed >= 2 ** 32) {
      throw new RangeError(`seed=${seed} must be a whole number from 0 to ${2 ** 32 - 1}.`);
    }
    this.twister = new Twister(seed);
  }

  /** `count` normal numbers; a multiple of 16, which latents of 4 x 4 or more always are. */
  normal(count) {
    const values = Float32Array.from({ length: count }, () => (this.twister.next() & 0xffffff) / 2 ** 24);
    for (let start = 0; start < count; start += BLOCK) {
      for (let i = start; i < start + BLOCK / 2; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - values[i])); // Box and Muller, 1958
        const angle = 2 * Math.PI * values[i + BLOCK / 2];
        values[i] = radius * Math.cos(angle);
        values[i + BLOCK / 2] = radius * Math.sin(angle);
      }
    }
    return values;
  }
}
