// The pictures that were drawn, kept in this browser: IndexedDB, or memory where there is none.

const NAME = "pictures";

export async function openStore() {
  try {
    const database = await new Promise((resolve, reject) => {
      const opening = indexedDB.open("draw", 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore(NAME, { keyPath: "id", autoIncrement: true });
      };
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(opening.error);
    });
    return new Store(database);
  } catch {
    return new MemoryStore();
  }
}

const result = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

class Store {
  constructor(database) {
    this.database = database;
    this.isLasting = true;
  }

  #objects(mode) {
    return this.database.transaction(NAME, mode).objectStore(NAME);
  }

  /** Keep a picture; returns its id. Rejects where the browser has no room. */
  add(picture) {
    return result(this.#objects("readwrite").add(picture));
  }

  get(id) {
    return result(this.#objects("readonly").get(id));
  }

  /** The ids, the newest first. */
  async ids() {
    return (await result(this.#objects("readonly").getAllKeys())).reverse();
  }

  remove(id) {
    return result(this.#objects("readwrite").delete(id));
  }

  clear() {
    return result(this.#objects("readwrite").clear());
  }
}

class MemoryStore {
  #pictures = new Map();
  #next = 1;
  isLasting = false;

  async add(picture) {
    const id = this.#next++;
    this.#pictures.set(id, { ...picture, id });
    return id;
  }

  async get(id) {
    return this.#pictures.get(id);
  }

  async ids() {
    return [...this.#pictures.keys()].reverse();
  }

  async remove(id) {
    this.#pictures.delete(id);
  }

  async clear() {
    this.#pictures.clear();
  }
}
