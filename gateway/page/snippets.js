// The same request as code: curl, Python and OpenAI's client.

import { hasKey } from "./api.js";
import { byId, make } from "./dom.js";

const OPENAI_NAMES = ["prompt", "n", "size", "output_format", "output_compression", "model"];
const NATIVE_NAMES = { n: "num_images", output_compression: "jpeg_quality" };

/** What each language is called, and the code of a request. `files` are the names of fields. */
export const LANGUAGES = { curl: asCurl, Python: asPython, OpenAI: asOpenAi };

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${python(v)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

const endingOf = (values) => values.output_format ?? "png";

function asCurl(origin, model, values, files) {
  const key = hasKey() ? [`-H "Authorization: Bearer $KEY"`] : [];
  if ((values.n ?? 1) > 1) {
    const body = { ...values, model, response_format: "url" };
    return command([`curl ${origin}/v1/images/generations`, ...key, ...jsonOrForm(body, files)]);
  }
  const native = Object.entries(values).filter(([name]) => name !== "n")
    .map(([name, value]) => [NATIVE_NAMES[name] ?? name, value]);
  const parts = jsonOrForm(Object.fromEntries(native), files);
  const path = `${origin}/predictions/${encodeURIComponent(model)}`;
  return command([`curl ${path}`, ...key, ...parts, `-o picture.${endingOf(values)}`]);
}

const command = (parts) => parts.join(" \\\n  ");

function jsonOrForm(values, files) {
  if (!files.length) {
    return ["-H 'Content-Type: application/json'", `-d ${shell(JSON.stringify(values))}`];
  }
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  return [
    ...Object.entries(values).map(([name, value]) => `--form-string ${shell(`${name}=${text(value)}`)}`),
    ...files.map((name) => `-F ${name}=@${name}.png`),
  ];
}

function asPython(origin, model, values, files) {
  const body = Object.entries({ model, ...values })
    .map(([name, value]) => `    ${JSON.stringify(name)}: ${python(value)},`);
  const pictures = files.map((name) => (
    `    ${JSON.stringify(name)}: base64.b64encode(open("${name}.png", "rb").read()).decode(),`));
  const key = hasKey();
  return [
    "import base64", ...(key ? ["import os"] : []), "", "import requests", "",
    "body = {", ...body, ...pictures, "}",
    ...(key ? [`headers = {"Authorization": f"Bearer {os.environ['KEY']}"}`] : []),
    `reply = requests.post("${origin}/v1/images/generations", json=body${key ? ", headers=headers" : ""})`,
    "reply.raise_for_status()",
    'for number, picture in enumerate(reply.json()["data"]):',
    `    with open(f"picture-{number}.${endingOf(values)}", "wb") as file:`,
    '        file.write(base64.b64decode(picture["b64_json"]))',
    '    print(number, picture["seed"])',
  ].join("\n");
}

function asOpenAi(origin, model, values, files) {
  const { width, height, ...rest } = values;
  const standard = { model, ...rest };
  if (width && height) standard.size = `${width}x${height}`;
  else Object.assign(standard, width && { width }, height && { height });
  const named = Object.entries(standard).filter(([name]) => OPENAI_NAMES.includes(name));
  const extra = Object.entries(standard).filter(([name]) => !OPENAI_NAMES.includes(name));
  const isEdit = files.includes("image");
  const lines = named.map(([name, value]) => `    ${name}=${python(value)},`);
  const others = [];
  for (const name of files) {
    const file = `open("${name}.png", "rb")`;
    if (isEdit && name === "image") lines.push(`    image=${file},`);
    else if (isEdit && name === "mask_image") lines.push(`    mask=${file},`);
    else others.push(`"${name}": base64.b64encode(${file}.read()).decode()`);
  }
  const beside = [...extra.map(([name, value]) => `${JSON.stringify(name)}: ${python(value)}`), ...others];
  if (beside.length) lines.push(`    extra_body={${beside.join(", ")}},`);
  const key = hasKey();
  return [
    "import base64", ...(key ? ["import os"] : []), "", "from openai import OpenAI", "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${key ? 'os.environ["KEY"]' : '"none"'})`,
    `reply = client.images.${isEdit ? "edit" : "generate"}(`, ...lines, ")",
    "for number, picture in enumerate(reply.data):",
    `    with open(f"picture-{number}.${endingOf(values)}", "wb") as file:`,
    "        file.write(base64.b64decode(picture.b64_json))",
  ].join("\n");
}

/** The dialog that shows them. */
export class CodeDialog {
  constructor() {
    this.buttons = Object.keys(LANGUAGES).map((name) => {
      const input = make("input", { type: "radio", name: "language", value: name });
      input.addEventListener("change", () => this.#show(name));
      return make("label", {}, input, make("span", {}, name));
    });
    byId("code-kinds").replaceChildren(...this.buttons);
    byId("code-close").addEventListener("click", () => byId("code").close());
    byId("code-copy").addEventListener("click", () => this.#copy());
  }

  open(model, values, files) {
    this.request = [location.origin, model, values, Object.keys(files)];
    this.files = files;
    const chosen = this.buttons.find((each) => each.firstChild.checked) ?? this.buttons[0];
    chosen.firstChild.checked = true;
    this.#show(chosen.firstChild.value);
    byId("code").showModal();
  }

  #show(language) {
    byId("code-text").textContent = LANGUAGES[language](...this.request);
    byId("code-said").textContent = "";
    const notes = hasKey() ? ["KEY in the environment is your key. "] : [];
    const links = Object.entries(this.files).map(([name, blob]) => {
      const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.png` }, `${name}.png`);
      return [link, " "];
    });
    if (links.length) notes.push("The pictures: ", ...links.flat());
    byId("code-note").replaceChildren(...notes);
  }

  async #copy() {
    const pre = byId("code-text");
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      // Pages that did not come over HTTPS have no clipboard: the old way.
      getSelection().selectAllChildren(pre);
      document.execCommand("copy");
    }
    byId("code-said").textContent = "Copied.";
  }
}
