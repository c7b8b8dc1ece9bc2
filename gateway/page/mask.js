// Paints a mask over a picture: by mouse, finger or pen, or by the keyboard.

import { make, showBlob } from "./dom.js";

const PAINT = "#ff2d78";
const STEPS_A_WIDTH = 24;

export class MaskPainter {
  constructor(field) {
    this.name = field.name;
    this.isErasing = false;
    this.undone = [];
    this.cursor = null;
    this.#make();
  }

  #make() {
    this.image = make("img", { alt: "", draggable: false });
    this.canvas = make("canvas", {
      tabIndex: 0, role: "application",
      "aria-label": "Paint what to draw anew. Arrow keys move the brush, space paints,"
        + " e erases, plus and minus change its size, u takes back.",
    });
    this.ring = make("div", { className: "brush", hidden: true });
    this.size = make("input", { type: "range", min: 2, max: 50, value: 14, id: "brush-size" });
    this.erase = this.#button("Erase", () => this.#setErasing(!this.isErasing));
    this.erase.setAttribute("aria-pressed", "false");
    this.said = make("p", { className: "muted hint", role: "status" });
    this.problem = make("p", { className: "field-problem", hidden: true });
    this.element = make("div", { className: "painter", "data-field": this.name },
      make("div", { className: "painter-canvas" }, this.image, this.canvas, this.ring),
      make("div", { className: "painter-tools" },
        make("div", { className: "with-slider" },
          make("label", { htmlFor: "brush-size" }, "Brush"), this.size),
        this.erase,
        this.#button("Undo", () => this.#undo()),
        this.#button("Invert", () => this.#invert()),
        this.#button("Clear", () => this.#wipe())),
      this.said, this.problem,
      make("p", { className: "help", id: `field-${this.name}-help` },
        "Paint over what is to be drawn anew; the rest is kept. Unpainted, all of it may change."));
    this.canvas.setAttribute("aria-describedby", `field-${this.name}-help`);
    this.#listen();
  }

  #button(label, action) {
    const button = make("button", { type: "button", className: "small" }, label);
    button.addEventListener("click", action);
    return button;
  }

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.#remember();
      this.last = null;
      this.#strokeTo(this.#place(event));
    });
    canvas.addEventListener("pointermove", (event) => {
      this.#showRing(this.#place(event));
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      const all = event.getCoalescedEvents?.() ?? [];
      for (const each of all.length ? all : [event]) this.#strokeTo(this.#place(each));
    });
    canvas.addEventListener("pointerup", () => this.#done());
    canvas.addEventListener("pointerleave", () => { this.ring.hidden = true; });
    canvas.addEventListener("blur", () => { this.ring.hidden = true; });
    canvas.addEventListener("focus", () => {
      if (canvas.matches(":focus-visible")) this.#showRing(this.#cursorPlace());
    });
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Show a picture to paint over; `mask` is one that was painted before. */
  async show(blob, width, height, mask = null) {
    this.clear();
    showBlob(this.image, blob);
    Object.assign(this.canvas, { width, height });
    this.isShown = true;
    if (mask) await this.#draw(mask);
    this.#done();
  }

  clear() {
    showBlob(this.image, null);
    this.isShown = false;
    this.undone = [];
    this.cursor = null;
    Object.assign(this.canvas, { width: 1, height: 1 });
    this.#setErasing(false);
    this.said.textContent = "";
  }

  /** The mask as a picture: white is drawn anew; null where nothing is painted. */
  async file() {
    if (!this.isShown || this.#share() === 0) return null;
    const { width, height } = this.canvas;
    const out = make("canvas", { width, height });
    const context = out.getContext("2d");
    const paint = this.#pixels();
    for (let i = 0; i < paint.data.length; i += 4) {
      const value = paint.data[i + 3] >= 128 ? 255 : 0;
      paint.data.fill(value, i, i + 3);
      paint.data[i + 3] = 255;
    }
    context.putImageData(paint, 0, 0);
    return new Promise((resolve) => { out.toBlob(resolve, "image/png"); });
  }

  showProblem(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  focus() {
    this.canvas.focus();
  }

  get #context() {
    return this.canvas.getContext("2d", { willReadFrequently: true });
  }

  #pixels() {
    return this.#context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  #share() {
    const { data } = this.#pixels();
    let painted = 0;
    for (let i = 3; i < data.length; i += 4) if (data[i] >= 128) painted += 1;
    return painted / (data.length / 4);
  }

  async #draw(mask) {
    const bitmap = await createImageBitmap(mask);
    this.#context.drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    bitmap.close();
    const paint = this.#pixels();
    const [red, green, blue] = [0xff, 0x2d, 0x78];
    for (let i = 0; i < paint.data.length; i += 4) {
      const isPainted = paint.data[i] >= 128;
      paint.data.set(isPainted ? [red, green, blue, 255] : [0, 0, 0, 0], i);
    }
    this.#context.putImageData(paint, 0, 0);
  }

  /** The brush's diameter, in pixels of the picture. */
  get #brush() {
    return (Number(this.size.value) / 100) * Math.max(this.canvas.width, this.canvas.height);
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  #strokeTo(place) {
    const context = this.#context;
    context.globalCompositeOperation = this.isErasing ? "destination-out" : "source-over";
    Object.assign(context, {
      strokeStyle: PAINT, lineWidth: this.#brush, lineCap: "round", lineJoin: "round",
    });
    context.beginPath();
    const from = this.last ?? place;
    context.moveTo(from.x, from.y);
    // A point has no length, and is drawn as a dot by its round ends.
    context.lineTo(place.x + (this.last ? 0 : 0.01), place.y);
    context.stroke();
    context.globalCompositeOperation = "source-over";
    this.last = place;
    this.cursor = place;
  }

  #showRing(place) {
    const box = this.canvas.getBoundingClientRect();
    const scale = box.width / this.canvas.width;
    const size = this.#brush * scale;
    Object.assign(this.ring.style, {
      width: `${size}px`, height: `${size}px`,
      left: `${place.x * scale - size / 2}px`, top: `${place.y * scale - size / 2}px`,
    });
    this.ring.hidden = false;
  }

  #cursorPlace() {
    this.cursor ??= { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    return this.cursor;
  }

  #onKey(event) {
    const { width, height } = this.canvas;
    const step = Math.max(width, height) / STEPS_A_WIDTH;
    const moves = {
      ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
    };
    const place = this.#cursorPlace();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) {
      const [dx, dy] = moves[event.key];
      const next = {
        x: Math.min(width, Math.max(0, place.x + dx)), y: Math.min(height, Math.max(0, place.y + dy)),
      };
      // With shift it paints all the way.
      if (event.shiftKey) {
        this.#remember();
        this.last = place;
        this.#strokeTo(next);
        this.#done();
      }
      this.cursor = next;
    } else if (event.key === " " || event.key === "Enter") {
      this.#remember();
      this.last = null;
      this.#strokeTo(place);
      this.#done();
    } else if (event.key === "+" || event.key === "-") {
      this.size.value = Number(this.size.value) + (event.key === "+" ? 2 : -2);
    } else if (event.key === "e") {
      this.#setErasing(!this.isErasing);
    } else if (event.key === "u") {
      this.#undo();
    } else {
      return;
    }
    event.preventDefault();
    this.#showRing(this.#cursorPlace());
  }

  #setErasing(isErasing) {
    this.isErasing = isErasing;
    this.erase.setAttribute("aria-pressed", String(isErasing));
  }

  #remember() {
    this.undone.push(this.#pixels());
    if (this.undone.length > 12) this.undone.shift();
  }

  #undo() {
    const before = this.undone.pop();
    if (before) this.#context.putImageData(before, 0, 0);
    this.#done();
  }

  #invert() {
    this.#remember();
    const context = this.#context;
    context.globalCompositeOperation = "source-out";
    context.fillStyle = PAINT;
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.globalCompositeOperation = "source-over";
    this.#done();
  }

  #wipe() {
    this.#remember();
    this.#context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#done();
  }

  #done() {
    this.last = null;
    const share = this.#share();
    this.said.textContent = share ? `${Math.max(1, Math.round(share * 100))} % is drawn anew.` : "";
    this.canvas.dispatchEvent(new CustomEvent("picture", { bubbles: true }));
  }
}
