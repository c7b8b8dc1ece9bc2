// The page: puts form, stage and gallery together.

import { ApiError, getJson, hasKey, isKeyRemembered, setKey } from "./api.js";
import { byId, make, say } from "./dom.js";
import { encodeFiles, pictureIn } from "./pictures.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { readParameters } from "./metadata.js";
import { CodeDialog } from "./snippets.js";
import { Stage } from "./stage.js";

const RETRY_MS = 3000;
const NARROW = "(max-width: 56rem)"; // as in page.css
const DRAFT = "draft";

const stage = new Stage();
const code = new CodeDialog();
let form = null;
let model = "";
let gallery = null;

// What the gateway serves.

async function connect() {
  try {
    const { data } = await getJson("/v1/models");
    if (!data.length) throw new ApiError(503, { message: "No model has been started yet." });
    const names = data.map((each) => each.id);
    showModels(names);
    const wanted = names.includes(model) ? model : localStorage.getItem("model");
    await choose(names.includes(wanted) ? wanted : names[0]);
  } catch (error) {
    if (error.status === 401) {
      askForKey(error.message);
      return;
    }
    showReady(false, error.message);
    setTimeout(connect, RETRY_MS);
  }
}

function showModels(names) {
  byId("model").replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  byId("model-choice").hidden = names.length < 2;
}

async function choose(name) {
  const described = await getJson(`/v1/fields?model=${encodeURIComponent(name)}`);
  const [values, files] = form ? [form.values(), await form.files()] : [readDraft(), {}];
  model = described.model;
  byId("model").value = model;
  localStorage.setItem("model", model);
  form = new Form(described);
  await form.fill(values, files);
  showReady(described.ready, described.ready ? `${model} is ready` : `${model} is starting…`);
  if (!described.ready) setTimeout(refreshReady, RETRY_MS);
}

async function refreshReady() {
  const { ready } = await getJson(`/v1/fields?model=${encodeURIComponent(model)}`).catch(() => ({}));
  showReady(ready, ready ? `${model} is ready` : `${model} is starting…`);
  if (!ready) setTimeout(refreshReady, RETRY_MS);
}

function showReady(isReady, text) {
  byId("ready").textContent = text;
  byId("ready").classList.toggle("is-ready", Boolean(isReady));
}

function readDraft() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}

// Drawing.

async function draw() {
  if (stage.isBusy || !form) return;
  form.clearProblems();
  say(byId("notice"), "");
  const own = form.ownProblems();
  if (Object.keys(own).length) {
    form.showProblems("", own);
    return;
  }
  const values = form.values();
  const files = await form.files();
  // Each picture is kept as one of its own, with its own seed.
  const { n: _, ...kept } = values;
  const drawnBy = model;
  setBusy(true);
  // Where the form is above the stage, it makes room for it.
  const block = matchMedia(NARROW).matches ? "start" : "nearest";
  byId("stage").scrollIntoView({ block, behavior: "smooth" });
  try {
    const body = { model, ...values, ...(await encodeFiles(files)) };
    await stage.draw(body, async ({ blob, tile }, event, took) => {
      const [width, height] = event.size.split("x").map(Number);
      const picture = await gallery.add({
        at: Date.now(), blob, values: kept, files, width, height,
        model: drawnBy, seed: event.seed, seconds: took, warning: event.warning ?? null,
      });
      if (!event.image_index) form.controls.get("seed")?.showDrawn(event.seed);
      if (event.warning) say(byId("notice"), event.warning);
      tile.replaceChildren(make("button", {
        type: "button", className: "thumbnail", onclick: () => gallery.view(picture),
      }, ...tile.childNodes));
    });
  } catch (error) {
    showError(error);
  } finally {
    setBusy(false);
  }
}

function showError(error) {
  if (error.status === 401) {
    askForKey(error.message);
    return;
  }
  const when = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  form.showProblems(error.message + when, error.fields ?? {});
  if (!(error instanceof ApiError)) throw error;
}

function setBusy(isBusy) {
  byId("draw").disabled = isBusy;
  byId("cancel").hidden = !isBusy;
  if (isBusy) byId("cancel").focus();
  else if (document.activeElement === document.body) byId("draw").focus();
}

// Pictures that come from elsewhere.

async function takePicture(file) {
  const parameters = await readParameters(file);
  if (!parameters) {
    drawFrom(file);
    return;
  }
  const beganWith = "image_sha256" in parameters ? "It began with a picture, which it does not carry. "
    : "";
  await useParameters(parameters);
  const instead = make("button", { type: "button", className: "small" }, "Draw from it instead");
  instead.addEventListener("click", () => drawFrom(file));
  byId("notice").replaceChildren(`The settings of ${file.name} are in the form. ${beganWith}`, instead);
  byId("notice").hidden = false;
}

async function useParameters(parameters) {
  // The task follows from the pictures, and those are not in the file.
  const { model: drawnBy, seed, task: _, ...values } = parameters;
  const names = [...byId("model").options].map((option) => option.value);
  if (names.includes(drawnBy) && drawnBy !== model) await choose(drawnBy);
  await form.fill({ ...values, ...(seed === undefined ? {} : { seed }) });
  saveDraft();
}

function drawFrom(blob) {
  const control = form?.pictures.find((each) => each.name === "image");
  if (!control) return;
  say(byId("notice"), "");
  byId("details-picture").open = true;
  control.take(blob);
  control.element.scrollIntoView({ block: "center", behavior: "smooth" });
}

async function useAgain(picture) {
  const names = [...byId("model").options].map((option) => option.value);
  if (names.includes(picture.model) && picture.model !== model) await choose(picture.model);
  await form.fill({ ...picture.values, seed: picture.seed }, picture.files ?? {});
  saveDraft();
  form.controls.get("prompt").focus();
}

function saveDraft() {
  if (form) localStorage.setItem(DRAFT, JSON.stringify(form.values()));
}

// The key.

function askForKey(why) {
  if (why) byId("key-why").textContent = why;
  byId("key-remember").checked = isKeyRemembered();
  if (!byId("key").open) byId("key").showModal();
}

function listenForKey() {
  byId("open-key").addEventListener("click", () => askForKey(""));
  byId("key-close").addEventListener("click", () => byId("key").close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(byId("key-value").value, { remember: byId("key-remember").checked });
    byId("key-value").value = "";
    byId("key").close();
    byId("open-key").classList.toggle("is-set", hasKey());
    connect();
  });
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  byId("form").addEventListener("input", saveDraft);
  byId("cancel").addEventListener("click", () => stage.cancel());
  byId("reset").addEventListener("click", () => {
    form?.fill({});
    localStorage.removeItem(DRAFT);
    form?.controls.get("prompt").focus();
  });
  byId("model").addEventListener("change", () => choose(byId("model").value).catch(showError));
  byId("open-code").addEventListener("click", async () => {
    if (form) code.open(model, form.values(), await form.files());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      draw();
    }
  });
  byId("open-settings").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    if (await readParameters(file)) takePicture(file);
    else say(byId("notice"), `${file.name} carries no settings.`);
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const file = pictureIn(event.dataTransfer);
    if (file && form) takePicture(file);
  });
  document.addEventListener("paste", (event) => {
    const file = pictureIn(event.clipboardData);
    if (file && form) takePicture(file);
  });
}

listen();
listenForKey();
byId("open-key").classList.toggle("is-set", hasKey());
gallery = await Gallery.open({
  use: useAgain,
  from: (picture) => drawFrom(picture.blob),
  code: (picture) => code.open(
    picture.model, { ...picture.values, seed: picture.seed }, picture.files ?? {}),
});
await connect();
