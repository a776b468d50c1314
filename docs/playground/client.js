// The model behind a worker: promises and steps instead of messages.

export class Client {
  /** Starts to load; `tell(share)` gets how much has been downloaded. `ready` resolves to the model's description. */
  constructor(tell) {
    this.waiting = new Map();
    this.count = 0;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    this.worker.onmessage = ({ data: { type, id, ...data } }) => {
      if (type === "progress") return tell(data.share);
      const request = this.waiting.get(id);
      if (type === "step") return request.onStep(data.step, data.picture);
      this.waiting.delete(id);
      if (type === "done") request.resolve(data.value);
      else request.reject(new DOMException(data.message, data.name));
    };
    this.ready = new Promise((resolve, reject) => {
      this.worker.onerror = (event) => reject(new Error(event.message || "the worker cannot be loaded"));
      this.request("load").then(resolve, reject);
    });
  }

  request(type, value, { onStep, signal } = {}) {
    const id = this.count++;
    signal?.addEventListener("abort", () => this.waiting.has(id) && this.worker.postMessage({ type: "cancel", id }));
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, onStep });
      this.worker.postMessage({ type, id, value });
    });
  }

  /**
   * One picture, {width, height, pixels}; see `Model.draw`. `onStep(step, picture)` gets it as it stands after each
   * step; `signal` ends it early, with an AbortError.
   */
  async draw(options, { onStep, signal } = {}) {
    await this.ready;
    return this.request("draw", { ...options, watched: onStep !== undefined }, { onStep, signal });
  }

  /** Draw with another adapter file from now on. */
  async setAdapter(buffer) {
    await this.ready;
    return this.request("adapter", buffer);
  }
}
