// What was drawn, with its parameters: a grid, and a viewer for one picture.

import { byId, make, say, showBlob } from "./dom.js";
import { labelOf } from "./fields.js";
import { openStore } from "./store.js";

const AT_A_TIME = 24;
const ENDINGS = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp" };

export class Gallery {
  /** `actions`: what the viewer's buttons do with a picture: use, from, code. */
  static async open(actions) {
    const store = await openStore();
    const gallery = new Gallery(store, actions);
    gallery.ids = await store.ids();
    await gallery.#showMore();
    return gallery;
  }

  constructor(store, actions) {
    this.store = store;
    this.ids = [];
    this.numShown = 0;
    byId("show-more").addEventListener("click", () => this.#showMore());
    byId("clear").addEventListener("click", () => this.#clear());
    const dialog = byId("viewer");
    const act = (id, action) => byId(id).addEventListener("click", () => {
      this.isLeft = true;
      dialog.close();
      action(this.shown);
    });
    act("viewer-use", actions.use);
    act("viewer-from", actions.from);
    act("viewer-code", actions.code);
    byId("viewer-close").addEventListener("click", () => dialog.close());
    act("viewer-delete", (picture) => this.#remove(picture.id));
    dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) this.#step(step);
    });
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
    dialog.addEventListener("close", () => {
      // An action has put the focus where it leads.
      if (!this.isLeft) byId("pictures").querySelector(`[data-id="${this.shown?.id}"] button`)?.focus();
    });
  }

  /** Keep a picture and show it first. Returns it with its id. */
  async add(picture) {
    try {
      picture.id = await this.store.add(picture);
    } catch {
      say(byId("notice"), "The browser has no room left for this picture: download it, or delete"
        + " others.");
      return picture;
    }
    this.ids.unshift(picture.id);
    this.numShown += 1;
    byId("pictures").prepend(this.#item(picture));
    this.#showState();
    return picture;
  }

  /** Show a picture large, with its parameters. */
  view(picture) {
    this.shown = picture;
    this.isLeft = false;
    const image = byId("viewer-image");
    showBlob(image, picture.blob);
    image.alt = picture.values.prompt ?? "A picture";
    byId("viewer-prompt").textContent = picture.values.prompt ?? "";
    byId("viewer-settings").replaceChildren(...settingsOf(picture));
    say(byId("viewer-warning"), picture.warning);
    const link = byId("viewer-download");
    link.href = image.dataset.url;
    link.download = `${picture.model}-${picture.seed}.${ENDINGS[picture.blob.type] ?? "png"}`;
    if (!byId("viewer").open) byId("viewer").showModal();
  }

  async #step(step) {
    const next = this.ids[this.ids.indexOf(this.shown.id) + step];
    if (next !== undefined) this.view(await this.store.get(next));
  }

  async #showMore() {
    const more = this.ids.slice(this.numShown, this.numShown + AT_A_TIME);
    const pictures = await Promise.all(more.map((id) => this.store.get(id)));
    this.numShown += more.length;
    byId("pictures").append(...pictures.filter(Boolean).map((each) => this.#item(each)));
    this.#showState();
  }

  #item(picture) {
    const image = make("img", { alt: picture.values.prompt ?? "", loading: "lazy" });
    showBlob(image, picture.blob);
    const button = make("button", { type: "button", className: "thumbnail" }, image);
    button.addEventListener("click", () => this.view(picture));
    return make("li", { "data-id": picture.id }, button,
      make("span", { className: "caption", "aria-hidden": "true" }, picture.values.prompt ?? ""));
  }

  #showState() {
    byId("gallery-empty").hidden = this.ids.length > 0;
    byId("clear").hidden = this.ids.length === 0;
    byId("show-more").hidden = this.numShown >= this.ids.length;
  }

  async #remove(id) {
    await this.store.remove(id);
    const item = byId("pictures").querySelector(`[data-id="${id}"]`);
    const next = item?.nextElementSibling ?? item?.previousElementSibling;
    if (item) {
      showBlob(item.querySelector("img"), null);
      item.remove();
      this.numShown -= 1;
    }
    this.ids = this.ids.filter((each) => each !== id);
    this.#showState();
    next?.querySelector("button").focus();
  }

  async #clear() {
    const count = this.ids.length;
    if (!window.confirm(`Delete ${count === 1 ? "the picture" : `all ${count} pictures`} from this browser?`)) return;
    await this.store.clear();
    for (const image of byId("pictures").querySelectorAll("img")) showBlob(image, null);
    byId("pictures").replaceChildren();
    this.ids = [];
    this.numShown = 0;
    this.#showState();
  }
}

function settingsOf(picture) {
  const { prompt, seed, ...values } = picture.values;
  const shown = {
    ...values, seed: picture.seed, size: `${picture.width} × ${picture.height}`,
    model: picture.model, time: `${picture.seconds.toFixed(1)} s`,
    drawn: new Date(picture.at).toLocaleString(),
  };
  delete shown.width;
  delete shown.height;
  for (const name of Object.keys(picture.files ?? {})) shown[name] = "sent";
  return Object.entries(shown).filter(([, value]) => value !== undefined && value !== null).flatMap(
    ([name, value]) => [make("dt", { "data-name": name }, labelOf(name)), make("dd", {}, String(value))]);
}
