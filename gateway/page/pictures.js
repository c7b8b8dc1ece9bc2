// The fields that are pictures: dropped, chosen or pasted, made small enough, and shown.

import { blobToBase64, make, showBlob } from "./dom.js";
import { FieldControl } from "./fields.js";
import { MaskPainter } from "./mask.js";

const READ_BY_SERVER = ["image/png", "image/jpeg", "image/webp"];

/** The file as it can be sent: its format known to the server, its size within the limits. */
export async function fitPicture(file, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "this"} is not a picture that this browser can read`);
  }
  const pixels = bitmap.width * bitmap.height;
  const fits = READ_BY_SERVER.includes(file.type) && file.size <= limits.max_picture_bytes
    && pixels <= limits.max_picture_pixels;
  try {
    if (fits) return { blob: file, width: bitmap.width, height: bitmap.height };
    // Nothing larger is drawn in any case.
    const scale = Math.min(1, Math.sqrt(limits.max_pixels / pixels));
    const canvas = make("canvas", {
      width: Math.max(1, Math.round(bitmap.width * scale)),
      height: Math.max(1, Math.round(bitmap.height * scale)),
    });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    let blob = await toBlob(canvas, "image/png");
    if (blob.size > limits.max_picture_bytes) blob = await toBlob(canvas, "image/jpeg", 0.92);
    return { blob, width: canvas.width, height: canvas.height };
  } finally {
    bitmap.close();
  }
}

export function toBlob(canvas, type, quality) {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("no picture"))), type, quality);
  });
}

export function pictureIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

/** A field that holds a picture; `withMask`: one over which a mask can be painted. */
export class PictureControl extends FieldControl {
  constructor(field, limits, maskField = null) {
    super(field);
    this.limits = limits;
    this.blob = null;
    this.painter = maskField ? new MaskPainter(maskField) : null;
    if (this.painter) this.shown.append(this.painter.element);
  }

  makeInput() {
    return make("input", { type: "file", accept: "image/*", className: "out-of-sight" });
  }

  body() {
    this.image = make("img", { alt: "The picture to begin with", className: "sent-picture" });
    const remove = make("button", { type: "button", className: "quiet" }, "Remove the picture");
    const choose = make("label", { className: "drop", htmlFor: this.id },
      make("span", {}, "Drop a picture here, or "), make("span", { className: "link" }, "choose one"));
    this.choose = choose;
    this.shown = make("div", { className: "sent", hidden: true }, this.image, remove);
    remove.addEventListener("click", () => {
      this.clear();
      this.input.focus();
    });
    this.input.addEventListener("change", () => {
      const [file] = this.input.files;
      this.input.value = "";
      if (file) this.take(file);
    });
    for (const target of [choose, this.shown]) {
      target.addEventListener("dragover", (event) => event.preventDefault());
      target.addEventListener("drop", (event) => {
        const file = pictureIn(event.dataTransfer);
        if (!file) return;
        event.preventDefault();
        event.stopPropagation();
        document.body.classList.remove("dragging");
        this.take(file);
      });
    }
    return [make("div", { className: "picture-input" }, this.input, choose), this.shown];
  }

  /** Use a file; what is wrong with it is shown at the field. */
  async take(file, mask = null) {
    this.showProblem("");
    try {
      const { blob, width, height } = await fitPicture(file, this.limits);
      this.blob = blob;
      showBlob(this.image, blob);
      this.shown.hidden = false;
      this.choose.hidden = true;
      this.image.hidden = Boolean(this.painter);
      await this.painter?.show(blob, width, height, mask);
    } catch (error) {
      this.showProblem(error.message);
    }
    this.input.dispatchEvent(new CustomEvent("picture", { bubbles: true }));
  }

  clear() {
    this.blob = null;
    showBlob(this.image, null);
    this.shown.hidden = true;
    this.choose.hidden = false;
    this.painter?.clear();
    this.input.dispatchEvent(new CustomEvent("picture", { bubbles: true }));
  }

  get value() {
    return undefined;
  }

  set value(value) {
    if (!value) this.clear();
  }

  /** What is sent, as files by their fields. */
  async files() {
    if (!this.blob) return {};
    const mask = await this.painter?.file();
    return { [this.name]: this.blob, ...(mask ? { [this.painter.name]: mask } : {}) };
  }
}

/** Files as a JSON body has them. */
export async function encodeFiles(files) {
  const entries = Object.entries(files).map(async ([name, blob]) => [name, await blobToBase64(blob)]);
  return Object.fromEntries(await Promise.all(entries));
}
