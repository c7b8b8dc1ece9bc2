// Draws one request: tiles with previews, progress, cancelling.

import { cancelRequest, newRequestId, postForEvents } from "./api.js";
import { base64ToBlob, byId, make, showBlob } from "./dom.js";

const PREVIEWS = 3; // the most that a stream has
const TYPES = { png: "image/png", jpeg: "image/jpeg", webp: "image/webp" };

export class Stage {
  #stop = null;
  #empty = byId("empty");

  get isBusy() {
    return this.#stop !== null;
  }

  cancel() {
    if (!this.isBusy) return;
    // To leave is enough to cancel, but the gateway may notice a little later.
    cancelRequest(this.requestId);
    this.#stop.abort();
  }

  /**
   * Draw what `body` asks for. `onPicture` gets each picture as it is finished.
   * Throws ApiError; returns the number of pictures, or null where it was cancelled.
   */
  async draw(body, onPicture) {
    const count = body.n ?? 1;
    const started = performance.now();
    this.#stop = new AbortController();
    this.requestId = newRequestId();
    this.#begin(count, body);
    const ticking = setInterval(() => {
      byId("elapsed").textContent = seconds(performance.now() - started);
    }, 200);
    try {
      const sent = { ...body, stream: true, partial_images: PREVIEWS };
      let finished = 0;
      const events = postForEvents(
        "/v1/images/generations", sent, this.requestId, this.#stop.signal);
      for await (const event of events) {
        if (event.type === "accepted") this.#say("Drawing…");
        else if (event.type.endsWith(".partial_image")) this.#showPreview(event, count);
        else if (event.type.endsWith(".completed")) {
          finished += 1;
          const took = performance.now() - started;
          await onPicture(this.#showPicture(event, finished, count, took), event, took / 1000);
        }
      }
      this.#say(`Done in ${seconds(performance.now() - started)}.`);
      return finished;
    } catch (error) {
      this.#removeUnfinished();
      if (error.name !== "AbortError") {
        this.#say("Not drawn.");
        throw error;
      }
      this.#say("Cancelled.");
      return null;
    } finally {
      clearInterval(ticking);
      this.#stop = null;
      byId("stage").removeAttribute("aria-busy");
      byId("progress").hidden = true;
      byId("elapsed").textContent = "";
    }
  }

  #begin(count, body) {
    const tiles = Array.from({ length: count }, () => (
      make("figure", { className: "tile waiting" }, make("img", { alt: "" }))));
    for (const tile of tiles) {
      if (body.width && body.height) tile.style.aspectRatio = `${body.width} / ${body.height}`;
    }
    for (const image of byId("tiles").querySelectorAll("img[data-url]")) showBlob(image, null);
    byId("tiles").replaceChildren(...tiles);
    byId("tiles").dataset.count = count;
    this.progress = new Array(count).fill(0);
    byId("stage").setAttribute("aria-busy", "true");
    byId("progress").hidden = false;
    byId("progress").removeAttribute("value");
    this.#say("Waiting for its turn…");
  }

  #showPreview(event, count) {
    const index = event.image_index ?? 0;
    const tile = byId("tiles").children[index];
    tile.className = "tile preview";
    const image = tile.querySelector("img");
    image.alt = "A preview";
    showBlob(image, base64ToBlob(event.b64_json, "image/jpeg"));
    this.#advance(index, (event.partial_image_index + 1) / (PREVIEWS + 1));
    const which = count > 1 ? ` of picture ${index + 1}` : "";
    this.#say(`Drawing… preview ${event.partial_image_index + 1} of ${PREVIEWS}${which}`);
  }

  #showPicture(event, finished, count, took) {
    const index = event.image_index ?? 0;
    const blob = base64ToBlob(event.b64_json, TYPES[event.output_format] ?? "image/png");
    const tile = byId("tiles").children[index];
    tile.className = "tile finished";
    tile.style.aspectRatio = "";
    const image = tile.querySelector("img");
    image.alt = "The picture that was drawn";
    showBlob(image, blob);
    this.#advance(index, 1);
    if (finished < count) this.#say(`${finished} of ${count} drawn after ${seconds(took)}…`);
    return { blob, tile };
  }

  #advance(index, share) {
    this.progress[index] = share;
    const sum = this.progress.reduce((a, b) => a + b, 0);
    byId("progress").value = sum / this.progress.length;
  }

  #removeUnfinished() {
    const tiles = byId("tiles");
    for (const tile of [...tiles.querySelectorAll(".waiting, .preview")]) {
      showBlob(tile.querySelector("img"), null);
      tile.remove();
    }
    tiles.dataset.count = tiles.children.length;
    if (!tiles.children.length) tiles.append(this.#empty);
  }

  #say(text) {
    byId("status").textContent = text;
  }
}

function seconds(ms) {
  return ms < 60000 ? `${(ms / 1000).toFixed(1)} s`
    : `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`;
}
