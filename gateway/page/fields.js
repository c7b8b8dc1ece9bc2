// One control for each field of the table: its label, range, help, default and problem.

import { make, withCode } from "./dom.js";

const LABELS = {
  n: "Pictures",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  negative_prompt: "Without",
  eta: "Eta (DDIM)",
  loras: "LoRAs",
  image: "Picture to begin with",
  mask_image: "What to draw anew",
  control_image: "Picture to follow",
  control: "ControlNet",
  controlnet_conditioning_scale: "How closely it is followed",
  control_guidance_start: "Counts from",
  control_guidance_end: "Counts until",
  image_guidance_scale: "How closely the picture is kept",
  padding_mask_crop: "Draw only the mask, with margin",
  output_format: "Format",
  output_compression: "Quality of JPEG and WebP",
  deadline_s: "Give up after (seconds)",
};
const LONG_TEXT = 500;
const LARGEST_SLIDER = 1000;
const WITHOUT_SLIDER = ["width", "height", "n"];

export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

/** Where a field stands in the form; what the table gets later finds its place by its help. */
export function groupOf(field) {
  const about = /^with [^`]*`(\w*image)`/.exec(field.help)?.[1];
  if (field.name === "control_image" || about === "control_image") return "control";
  if (field.kind === "picture" || field.name === "task" || about) return "picture";
  const main = ["prompt", "negative_prompt", "width", "height", "num_inference_steps",
    "guidance_scale", "n", "seed"];
  return main.includes(field.name) ? "main" : "more";
}

/** How the field's default is told in an empty control. */
export function defaultText(field) {
  if (field.default === null || field.default === undefined) return field.default_note || "";
  if (typeof field.default === "object") {
    return Object.entries(field.default).map(([name, scale]) => `${name}:${scale}`).join(", ");
  }
  return String(field.default);
}

/** A field of the form. An empty control means the default, and is not sent. */
export class FieldControl {
  constructor(field) {
    this.field = field;
    this.name = field.name;
    this.id = `field-${field.name}`;
    this.input = this.makeInput();
    this.element = this.#makeElement();
  }

  /** The control itself; others are made by the classes below. */
  makeInput() {
    return make("input", { type: "text", autocomplete: "off", placeholder: defaultText(this.field) });
  }

  /** What is laid around the control. */
  body() {
    return [this.input];
  }

  /** What is sent; undefined where nothing is. */
  get value() {
    return this.input.value.trim() || undefined;
  }

  set value(value) {
    this.input.value = value ?? "";
    this.changed();
  }

  /** The problem that the control itself sees; empty where there is none. */
  get ownProblem() {
    return "";
  }

  showProblem(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
    this.input.setAttribute("aria-invalid", String(Boolean(text)));
    this.element.classList.toggle("has-problem", Boolean(text));
  }

  focus() {
    this.input.focus();
  }

  /** Tell the form that the value has changed. */
  changed() {
    this.input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  #makeElement() {
    const { field, input, id } = this;
    input.id = id;
    input.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
    const help = make("p", { id: `${id}-help`, className: "help", hidden: true },
      ...withCode(field.help), this.#range());
    this.problem = make("p", { id: `${id}-problem`, className: "field-problem", hidden: true });
    const label = labelOf(field.name);
    const toggle = make("button", {
      type: "button", className: "help-toggle", "aria-label": `About ${label}`,
      "aria-expanded": "false", "aria-controls": `${id}-help`,
    }, "?");
    toggle.addEventListener("click", () => {
      help.hidden = !help.hidden;
      toggle.setAttribute("aria-expanded", String(!help.hidden));
    });
    const head = make("div", { className: "field-head" },
      make("label", { htmlFor: id }, label), ...this.headExtras(), toggle);
    return make("div", { className: "field", "data-field": field.name },
      head, ...this.body(), help, this.problem);
  }

  /** What stands beside the label. */
  headExtras() {
    return [];
  }

  #range() {
    const { kind, minimum, maximum } = this.field;
    const note = defaultText(this.field) ? ` Default: ${defaultText(this.field)}.` : "";
    if (kind === "integer" || kind === "number") return ` (${minimum} to ${maximum}).${note}`;
    if (kind === "text") return ` (up to ${maximum} characters).${note}`;
    return `.${note}`;
  }
}

class LongText extends FieldControl {
  makeInput() {
    const isPrompt = this.name === "prompt";
    const area = make("textarea", {
      rows: isPrompt ? 3 : 2,
      placeholder: isPrompt ? "a large red heart on a cyan background" : defaultText(this.field),
    });
    // As tall as its text, where the browser cannot do it alone.
    area.addEventListener("input", () => {
      area.style.height = "auto";
      area.style.height = `${Math.min(area.scrollHeight + 2, 320)}px`;
    });
    return area;
  }
}

class NumberControl extends FieldControl {
  makeInput() {
    const { kind, minimum, maximum } = this.field;
    const isInteger = kind === "integer";
    return make("input", {
      type: "number", min: minimum, max: maximum, step: isInteger ? 1 : "any",
      inputMode: isInteger ? "numeric" : "decimal", placeholder: shortDefault(this.field),
    });
  }

  body() {
    const { minimum, maximum, kind, default: byDefault } = this.field;
    if (!(maximum - minimum <= LARGEST_SLIDER) || WITHOUT_SLIDER.includes(this.name)) {
      return [this.input];
    }
    const step = kind === "integer" ? 1 : maximum - minimum <= 2 ? 0.01 : 0.1;
    // The box says the same to a screen reader, and takes the keyboard.
    const slider = make("input", {
      type: "range", min: minimum, max: maximum, step, tabIndex: -1, "aria-hidden": "true",
    });
    const follow = () => {
      slider.value = this.input.value === "" ? byDefault ?? minimum : this.input.value;
      slider.classList.toggle("unset", this.input.value === "");
    };
    slider.addEventListener("input", () => {
      this.input.value = slider.value;
      this.changed();
    });
    this.input.addEventListener("input", follow);
    follow();
    return [make("div", { className: "with-slider" }, slider, this.input)];
  }

  get value() {
    return this.input.value === "" ? undefined : Number(this.input.value);
  }

  set value(value) {
    super.value = value;
  }

  get ownProblem() {
    return this.input.validity.badInput ? "is not a number" : "";
  }
}

function shortDefault(field) {
  const text = defaultText(field);
  if (field.name === "seed") return "drawn";
  return text.length <= 12 ? text : "default";
}

/** The seed: drawn anew for each request, unless it is kept. */
class SeedControl extends NumberControl {
  body() {
    this.keep = make("input", { type: "checkbox", id: `${this.id}-keep` });
    this.input.addEventListener("input", (event) => {
      if (event.isTrusted) this.keep.checked = this.input.value !== "";
    });
    return [make("div", { className: "with-slider" }, this.input,
      make("label", { className: "inline", htmlFor: this.keep.id }, this.keep, "Keep it"))];
  }

  get value() {
    return this.keep.checked ? super.value : undefined;
  }

  set value(value) {
    this.keep.checked = value !== undefined && value !== null;
    super.value = value;
  }

  /** Show the seed that was drawn, so that it can be kept. */
  showDrawn(seed) {
    if (!this.keep.checked) this.input.value = seed;
  }
}

class ChoiceControl extends FieldControl {
  makeInput() {
    const unset = defaultText(this.field);
    return make("select", {},
      make("option", { value: "" }, unset ? `Default (${unset.replaceAll("`", "")})` : "Default"),
      ...this.field.choices.map((choice) => make("option", { value: choice }, choice)));
  }
}

class SwitchControl extends FieldControl {
  makeInput() {
    return make("input", { type: "checkbox" });
  }

  get value() {
    return this.input.checked || undefined;
  }

  set value(value) {
    this.input.checked = Boolean(value);
    this.changed();
  }
}

/** Text with suggestions: what the model has, else the names that the help gives. */
class SuggestedText extends FieldControl {
  body() {
    const names = this.field.suggestions
      ?? this.field.help.split("`").filter((_, index) => index % 2);
    const list = make("datalist", { id: `${this.id}-names` },
      ...names.map((name) => make("option", { value: name })));
    this.input.setAttribute("list", list.id);
    return [this.input, list];
  }
}

/** LoRAs by name, as text, with a button for each that the model has. */
class LorasControl extends FieldControl {
  makeInput() {
    const byDefault = defaultText(this.field);
    const placeholder = byDefault && !byDefault.includes(" ") ? byDefault : "style:0.8, ink";
    return make("input", { type: "text", autocomplete: "off", spellcheck: false, placeholder });
  }

  body() {
    const buttons = (this.field.suggestions ?? []).map((name) => {
      const button = make("button", { type: "button", className: "small" }, name);
      button.addEventListener("click", () => {
        this.value = withOrWithout(this.input.value, name);
      });
      return [name, button];
    });
    const show = () => {
      const named = writtenLoras(this.input.value).map(([name]) => name);
      for (const [name, button] of buttons) {
        button.setAttribute("aria-pressed", String(named.includes(name)));
      }
    };
    this.input.addEventListener("input", show);
    show();
    const list = make("div", { className: "shapes", role: "group", "aria-label": "LoRAs there are" },
      ...buttons.map(([, button]) => button));
    return buttons.length ? [list, this.input] : [this.input];
  }

  set value(value) {
    super.value = value && typeof value === "object" ? defaultText({ default: value }) : value;
  }

  get value() {
    return super.value;
  }
}

/** [name, its text] of each LoRA in `text`. */
function writtenLoras(text) {
  return text.split(",").map((each) => each.trim()).filter(Boolean)
    .map((each) => [each.split(":")[0].trim(), each]);
}

/** `text` without the LoRA `name`, or with it where it is not there. */
function withOrWithout(text, name) {
  const written = writtenLoras(text);
  const others = written.filter(([each]) => each !== name).map(([, each]) => each);
  return (others.length < written.length ? others : [...others, `${name}:1`]).join(", ");
}

/** The control for a field that is not a picture. */
export function makeControl(field) {
  if (field.name === "seed") return new SeedControl(field);
  if (field.name === "scheduler" || (field.suggestions && field.kind === "text")) {
    return new SuggestedText(field);
  }
  if (field.kind === "loras") return new LorasControl(field);
  if (field.kind === "integer" || field.kind === "number") return new NumberControl(field);
  if (field.kind === "choice") return new ChoiceControl(field);
  if (field.kind === "boolean") return new SwitchControl(field);
  return field.maximum > LONG_TEXT ? new LongText(field) : new FieldControl(field);
}
