// Reads the parameters that a picture carries: ours in JSON, or the line of AUTOMATIC1111's web UI.

const LABELS = {
  Steps: "num_inference_steps",
  Sampler: "scheduler",
  "CFG scale": "guidance_scale",
  Seed: "seed",
  "Eta DDIM": "eta",
  "Denoising strength": "strength",
};
const NUMBERS = new Set(["num_inference_steps", "guidance_scale", "seed", "eta", "strength"]);

/** The parameters in a file, by their fields; null where it has none. */
export async function readParameters(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const texts = isPng(bytes) ? await pngTexts(bytes) : { parameters: exifComment(bytes) };
    if (texts.generation) return JSON.parse(texts.generation);
    return texts.parameters ? parseLine(texts.parameters) : null;
  } catch {
    return null; // a broken file has none
  }
}

const latin1 = (bytes) => new TextDecoder("latin1").decode(bytes);
const utf8 = (bytes) => new TextDecoder().decode(bytes);
const isPng = (bytes) => latin1(bytes.subarray(1, 4)) === "PNG";

async function pngTexts(bytes) {
  const view = new DataView(bytes.buffer);
  const texts = {};
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view.getUint32(at);
    const kind = latin1(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "IEND") break;
    if (["tEXt", "zTXt", "iTXt"].includes(kind)) {
      const end = data.indexOf(0);
      texts[latin1(data.subarray(0, end))] = await chunkText(kind, data.subarray(end + 1));
    }
    at += 12 + length;
  }
  return texts;
}

async function chunkText(kind, data) {
  if (kind === "tEXt") return latin1(data);
  if (kind === "zTXt") return latin1(await inflate(data.subarray(1)));
  const isCompressed = data[0] === 1;
  const language = data.indexOf(0, 2);
  const text = data.subarray(data.indexOf(0, language + 1) + 1);
  return utf8(isCompressed ? await inflate(text) : text);
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The EXIF user comment of a JPEG or WebP. */
function exifComment(bytes) {
  const start = findExif(bytes);
  if (start === null) return null;
  const view = new DataView(bytes.buffer, start);
  const isLittle = view.getUint16(0) === 0x4949;
  const entry = (offset, wanted) => {
    const count = view.getUint16(offset, isLittle);
    for (let i = 0; i < count; i += 1) {
      const at = offset + 2 + 12 * i;
      if (view.getUint16(at, isLittle) === wanted) return at;
    }
    return null;
  };
  const pointer = entry(view.getUint32(4, isLittle), 0x8769);
  const comment = pointer === null ? null : entry(view.getUint32(pointer + 8, isLittle), 0x9286);
  if (comment === null) return null;
  const length = view.getUint32(comment + 4, isLittle);
  const from = start + view.getUint32(comment + 8, isLittle);
  const [code, text] = [bytes.subarray(from, from + 8), bytes.subarray(from + 8, from + length)];
  if (!latin1(code).startsWith("UNICODE")) return utf8(text);
  return new TextDecoder(isLittle ? "utf-16le" : "utf-16be").decode(text);
}

function findExif(bytes) {
  const view = new DataView(bytes.buffer);
  if (view.getUint16(0) === 0xffd8) {
    for (let at = 2; at + 4 < bytes.length && bytes[at] === 0xff;) {
      const isExif = bytes[at + 1] === 0xe1 && latin1(bytes.subarray(at + 4, at + 8)) === "Exif";
      if (isExif) return at + 10;
      at += 2 + view.getUint16(at + 2);
    }
  } else if (latin1(bytes.subarray(8, 12)) === "WEBP") {
    for (let at = 12; at + 8 <= bytes.length;) {
      const length = view.getUint32(at + 4, true);
      if (latin1(bytes.subarray(at, at + 4)) === "EXIF") {
        return at + 8 + (latin1(bytes.subarray(at + 8, at + 12)) === "Exif" ? 6 : 0);
      }
      at += 8 + length + (length % 2);
    }
  }
  return null;
}

function parseLine(text) {
  const lines = text.split("\n");
  const last = lines.at(-1);
  if (!/(^|, )Steps: \d/.test(last)) return { prompt: text.trim() };
  const body = lines.slice(0, -1).join("\n");
  const [prompt, negative] = body.split(/^Negative prompt: /m);
  const found = { prompt: prompt.trim() };
  if (negative) found.negative_prompt = negative.trim();
  for (const [, label, quoted, plain] of last.matchAll(/([\w ]+): (?:("(?:\\.|[^"])*")|([^,]*))(?:, |$)/g)) {
    const value = quoted ? JSON.parse(quoted) : plain.trim();
    const name = LABELS[label.trim()];
    if (label.trim() === "Size") {
      [found.width, found.height] = value.split("x").map(Number);
    } else if (name) {
      found[name] = NUMBERS.has(name) ? Number(value) : value;
    }
  }
  return found;
}
