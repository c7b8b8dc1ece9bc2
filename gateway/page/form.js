// The form: made of the table of fields, read, filled and told what is wrong.

import { byId, make, say } from "./dom.js";
import { groupOf, labelOf, makeControl } from "./fields.js";
import { PictureControl } from "./pictures.js";

const SHAPES = [
  ["Square", 1, 1], ["Portrait", 3, 4], ["Landscape", 4, 3], ["Wide", 16, 9],
];
const SHAPE_GRID_PX = 64;
// What errors and metadata call a field.
const OTHER_NAMES = { mask: "mask_image", num_images: "n", jpeg_quality: "output_compression" };

export class Form {
  /** `form` is made by GET /v1/fields. */
  constructor(form) {
    this.limits = form.limits;
    this.controls = new Map();
    for (const group of ["main", "picture", "control", "more"]) byId(`group-${group}`).replaceChildren();
    for (const field of form.fields) this.#add(field, form.fields);
    this.#placeMain();
    for (const group of ["picture", "control", "more"]) {
      byId(`details-${group}`).hidden = !byId(`group-${group}`).children.length;
    }
  }

  #add(field, fields) {
    if (field.name === "mask_image") return; // painted over the picture
    const mask = field.name === "image" && fields.find((each) => each.name === "mask_image");
    const control = field.kind === "picture"
      ? new PictureControl(field, this.limits, mask)
      : makeControl(field);
    this.controls.set(field.name, control);
    if (control.painter) this.controls.set(control.painter.name, control.painter);
    byId(`group-${groupOf(field)}`).append(control.element);
  }

  /** In the order in which people think of them; the size has shapes to choose from. */
  #placeMain() {
    const group = byId("group-main");
    const take = (name) => this.controls.get(name)?.element;
    const [width, height] = [this.controls.get("width"), this.controls.get("height")];
    const rows = [take("prompt"), take("negative_prompt")];
    if (width && height) {
      rows.push(make("fieldset", { className: "size" }, make("legend", {}, "Size"),
        this.#shapes(width, height), make("div", { className: "row" }, width.element, height.element)));
    }
    rows.push(make("div", { className: "row" },
      ...["num_inference_steps", "guidance_scale"].map(take).filter(Boolean)));
    rows.push(make("div", { className: "row narrow-first" }, ...["n", "seed"].map(take).filter(Boolean)));
    group.prepend(...rows.filter(Boolean));
    // What nobody needs to set comes last.
    const task = take("task");
    task?.parentElement.append(task);
  }

  #shapes(width, height) {
    const [ownWidth, ownHeight] = [width.field.default ?? 1024, height.field.default ?? 1024];
    const sizes = SHAPES.map(([name, across, down]) => [
      name, ...shapeSize(ownWidth * ownHeight, across / down, this.limits.max_pixels, width.field)])
      .filter(([, wide, high]) => wide !== ownWidth || high !== ownHeight);
    const buttons = [["Default", undefined, undefined], ...sizes].map(([name, wide, high]) => {
      const title = wide ? `${wide} × ${high}` : `${ownWidth} × ${ownHeight}, or that of the picture`;
      const button = make("button", { type: "button", className: "small", title }, name);
      button.addEventListener("click", () => {
        width.value = wide;
        height.value = high;
      });
      return [button, wide, high];
    });
    const show = () => {
      for (const [button, wide, high] of buttons) {
        const isIt = (width.value ?? ownWidth) === (wide ?? ownWidth)
          && (height.value ?? ownHeight) === (high ?? ownHeight);
        button.setAttribute("aria-pressed", String(isIt));
      }
    };
    for (const each of [width, height]) each.input.addEventListener("input", show);
    show();
    return make("div", { className: "shapes" }, ...buttons.map(([button]) => button));
  }

  get pictures() {
    return [...this.controls.values()].filter((each) => each instanceof PictureControl);
  }

  /** What is sent, without pictures: fields that are set, by their names. */
  values() {
    const set = [...this.controls].map(([name, each]) => [name, each.value]);
    return Object.fromEntries(set.filter(([, value]) => value !== undefined));
  }

  /** The pictures that are sent, as files by their fields. */
  async files() {
    return Object.assign({}, ...(await Promise.all(this.pictures.map((each) => each.files()))));
  }

  /** Fill the form; what `values` leave out is as if never touched. */
  async fill(values, files = {}) {
    this.clearProblems();
    const named = Object.entries(values).map(([name, value]) => [OTHER_NAMES[name] ?? name, value]);
    const known = Object.fromEntries(named);
    for (const [name, each] of this.controls) {
      if (each instanceof PictureControl) {
        const mask = each.painter ? files[each.painter.name] : null;
        if (files[name]) await each.take(files[name], mask);
        else each.clear();
      } else if (each.field) {
        each.value = known[name] ?? undefined;
      }
    }
    this.openWhatIsSet();
  }

  /** Open the parts of the form in which something is set. */
  openWhatIsSet() {
    for (const group of ["picture", "control", "more"]) {
      const isSet = [...this.controls.values()].some((each) => (
        each.field && groupOf(each.field) === group && (each.value !== undefined || each.blob)));
      if (isSet) open(byId(`details-${group}`));
    }
  }

  /** Problems that the controls see themselves, by field. */
  ownProblems() {
    const found = [...this.controls].map(([name, each]) => [name, each.ownProblem]);
    return Object.fromEntries(found.filter(([, problem]) => problem));
  }

  clearProblems() {
    say(byId("problem"), "");
    for (const each of this.controls.values()) each.showProblem("");
  }

  /** Show each problem by its field, the rest below the form; the first one gets the focus. */
  showProblems(message, fields) {
    const elsewhere = [];
    let first = null;
    for (const [sent, problem] of Object.entries(fields)) {
      const name = OTHER_NAMES[sent] ?? sent;
      const control = this.controls.get(name);
      if (!control) {
        elsewhere.push(`${labelOf(sent)}: ${problem}`);
        continue;
      }
      control.showProblem(problem);
      first ??= control;
      open(control.element.closest("details"));
    }
    const count = Object.keys(fields).length - elsewhere.length;
    const said = count === 0 ? [message] : [count === 1 ? "Not drawn: see the field marked above."
      : `Not drawn: see the ${count} fields marked above.`, ...elsewhere];
    say(byId("problem"), said.join(" "));
    first?.focus();
  }
}

function open(details) {
  for (let each = details; each; each = each.parentElement.closest("details")) each.open = true;
}

/** Width and height of about `area` pixels in a ratio, on a grid that every model takes. */
function shapeSize(area, ratio, maxPixels, { minimum, maximum }) {
  const onGrid = (side) => {
    const rounded = Math.round(side / SHAPE_GRID_PX) * SHAPE_GRID_PX;
    return Math.min(maximum, Math.max(minimum, rounded));
  };
  let [wide, high] = [onGrid(Math.sqrt(area * ratio)), onGrid(Math.sqrt(area / ratio))];
  while (wide * high > maxPixels && high > SHAPE_GRID_PX) {
    high -= SHAPE_GRID_PX;
    wide = onGrid(high * ratio);
  }
  return [wide, high];
}
