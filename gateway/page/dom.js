// Small helpers for elements. Nothing here takes HTML as text.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `data-*` and `aria-*` are attributes) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name === "className" ? "class" : name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text whose words in `backticks` are code. */
export function withCode(text) {
  return text.split("`").map((part, index) => (index % 2 ? make("code", {}, part) : part));
}

/** Put a blob into an <img>, and let go of the one that was there. */
export function showBlob(image, blob) {
  const before = image.dataset.url;
  if (before) URL.revokeObjectURL(before);
  if (!blob) {
    image.removeAttribute("src");
    delete image.dataset.url;
    return;
  }
  image.dataset.url = URL.createObjectURL(blob);
  image.src = image.dataset.url;
}

/** Say something in an element, or hide it where there is nothing to say. */
export function say(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

export function base64ToBlob(text, type) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return new Blob([bytes], { type });
}

export async function blobToBase64(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let binary = "";
  // In parts: an argument list has a largest length.
  for (let i = 0; i < bytes.length; i += 32768) {
    binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
  }
  return btoa(binary);
}
