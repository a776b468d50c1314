// Runs the model beside the page, so that the page stays responsive while it computes.

import { Model } from "./model.js";

const cancelled = new Set();
let model;
let queue = Promise.resolve(); // one drawing at a time

const messages = () => new Promise((resolve) => setTimeout(resolve)); // lets what has come in meanwhile be read

async function load() {
  model = await Model.load((share) => postMessage({ type: "progress", share }));
  return model.description;
}

async function draw(id, { watched, ...options }) {
  return model.draw(options, async (step, look) => {
    if (watched) postMessage({ type: "step", id, step, picture: await look() });
    await messages();
    if (cancelled.delete(id)) throw new DOMException("Another drawing took its place.", "AbortError");
  });
}

const tasks = { load, draw, adapter: async (id, buffer) => model.setAdapter(buffer) };

onmessage = ({ data: { type, id, value } }) => {
  if (type === "cancel") cancelled.add(id);
  else {
    queue = queue.then(async () => {
      try {
        postMessage({ type: "done", id, value: await tasks[type](id, value) });
      } catch (error) {
        postMessage({ type: "failed", id, name: error.name, message: error.message });
      }
    });
  }
};
