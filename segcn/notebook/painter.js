// A mask is one byte a pixel, the class id. It is painted without antialiasing, so no class is invented. Each change goes
// to the kernel whole and as a message of its own: a widget's state may be held back while the kernel is busy, and a button
// pressed after a stroke would then overtake it.

const STEPS_BACK = 50;
const TOOLS = { brush: "Brush", fill: "Fill", eraser: "Eraser" };
const SIDE = 360; // px of the longer side on the screen
const MANY = 16; // classes, from which on they can be searched

function stamp(mask, x, y, size, id) {
  const { ids, width, height } = mask, radius = size / 2;
  const inside = x >= 0 && y >= 0 && x < width && y < height;
  if (inside) ids[Math.floor(y) * width + Math.floor(x)] = id;
  const top = Math.max(0, Math.floor(y - radius)), bottom = Math.min(height - 1, Math.ceil(y + radius));
  const left = Math.max(0, Math.floor(x - radius)), right = Math.min(width - 1, Math.ceil(x + radius));
  for (let row = top; row <= bottom; row++)
    for (let column = left; column <= right; column++)
      if ((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius ** 2) ids[row * width + column] = id;
}

function stroke(mask, from, to, size, id) {
  const steps = Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / Math.max(0.5, size / 4)) || 1;
  for (let step = 0; step <= steps; step++) {
    const share = step / steps;
    stamp(mask, from.x + share * (to.x - from.x), from.y + share * (to.y - from.y), size, id);
  }
}

function flood({ ids, width, height }, x, y, id) {
  const start = Math.floor(y) * width + Math.floor(x), old = ids[start], waiting = [start];
  while (old !== id && waiting.length) {
    const at = waiting.pop(), column = at % width;
    if (ids[at] !== old) continue;
    ids[at] = id;
    if (column > 0) waiting.push(at - 1);
    if (column < width - 1) waiting.push(at + 1);
    if (at >= width) waiting.push(at - width);
    if (at < width * (height - 1)) waiting.push(at + width);
  }
}

const same = (a, b) => a.length === b.length && a.every((id, at) => id === b[at]);
const make = (tag, className, properties = {}) => Object.assign(document.createElement(tag), { className, ...properties });

function read(model) {
  const view = model.get("ids"); // a window onto the message it came in
  const ids = new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice();
  return { ids, width: model.get("width"), height: model.get("height") };
}

function render({ model, el }) {
  const labels = model.get("labels"), eraser = model.get("eraser");
  const names = Object.fromEntries(labels.map(({ id, name }) => [id, name]));
  const colors = new Uint32Array(256).fill(0xff000000);
  for (const { id, color: [red, green, blue] } of labels) colors[id] = 0xff000000 | (blue << 16) | (green << 8) | red;

  let mask = { ids: new Uint8Array(), width: 0, height: 0 };
  let tool = "brush", chosen = labels[0].id, size = 1, last = null, before = null;
  const past = [], future = [];

  const root = make("div", "segcn-painter", { tabIndex: 0 });
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own, such as z
  const canvas = make("canvas", "segcn-canvas"), ring = make("div", "segcn-ring"), under = make("div", "segcn-under");
  const paper = make("div", "segcn-paper"), board = make("div", "segcn-board"), tools = make("div", "segcn-tools");
  const legend = make("div", "segcn-legend"), context = canvas.getContext("2d");

  function draw() {
    const { ids, width, height } = mask;
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    for (let at = 0; at < ids.length; at++) pixels[at] = colors[ids[at]];
    context.putImageData(image, 0, 0);
  }

  function fit() {
    const { width, height } = mask, scale = SIDE / Math.max(width, height);
    Object.assign(canvas, { width, height });
    Object.assign(canvas.style, { width: `${width * scale}px`, height: `${height * scale}px` });
    slider.max = Math.max(8, Math.round(Math.max(width, height) / 3));
    setSize(Math.max(1, Math.round(Math.max(width, height) / 16)));
    past.length = future.length = 0;
  }

  function send() {
    model.set("ids", new DataView(mask.ids.slice().buffer)); // for other views of this page
    model.send({ kind: "painted", width: mask.width, height: mask.height }, undefined, [mask.ids.slice().buffer]);
  }

  function keep(old) {
    if (same(old, mask.ids)) return false;
    past.push(old);
    if (past.length > STEPS_BACK) past.shift();
    future.length = 0;
    return true;
  }

  function finish(old) {
    if (keep(old)) send();
    show();
  }

  function travel(from, to) {
    if (!from.length) return;
    to.push(mask.ids);
    mask.ids = from.pop();
    send();
    show();
  }

  function show() {
    draw();
    undo.disabled = !past.length;
    redo.disabled = !future.length;
    for (const button of root.querySelectorAll("[data-tool]")) press(button, button.dataset.tool === tool);
    for (const button of legend.querySelectorAll("button")) press(button, Number(button.dataset.id) === chosen);
  }

  function arrived() {
    const found = read(model), sized = found.width === mask.width && found.height === mask.height;
    if (found.ids.length !== found.width * found.height || !found.ids.length) return;
    if (sized && same(found.ids, mask.ids)) return;
    const old = mask.ids;
    mask = found;
    before = null; // a stroke that was under way was on the old one
    if (sized) keep(old);
    else fit();
    show();
    canvas.dataset.ready = "true";
  }

  const press = (button, on) => button.setAttribute("aria-pressed", on);
  const color = () => (tool === "eraser" ? eraser : chosen);

  function setSize(value) {
    size = Math.min(Math.max(1, value), Number(slider.max));
    slider.value = size;
    number.textContent = `${size} px`;
  }

  function button(text, title, action) {
    const made = make("button", "segcn-tool", { type: "button", textContent: text, title });
    made.addEventListener("click", action);
    return made;
  }

  for (const [name, text] of Object.entries(TOOLS)) {
    const made = button(text, `${text} (${name[0]})`, () => ((tool = name), show()));
    made.dataset.tool = name;
    tools.append(made);
  }
  const slider = make("input", "segcn-size", { type: "range", min: 1, title: "Size of brush and eraser ([ and ])" });
  const number = make("span", "segcn-number");
  slider.addEventListener("input", () => setSize(Number(slider.value)));
  const undo = button("Undo", "Undo (Ctrl+Z)", () => travel(past, future));
  const redo = button("Redo", "Redo (Ctrl+Shift+Z)", () => travel(future, past));
  const clear = button("Clear", `All to ${names[eraser]}`, () => {
    const old = mask.ids.slice();
    mask.ids.fill(eraser);
    finish(old);
  });
  tools.append(slider, number, undo, redo, clear);

  for (const { id, name, color: rgb } of labels) {
    const made = button("", `${name} (id ${id})`, () => {
      chosen = id;
      if (tool === "eraser") tool = "brush";
      show();
    });
    made.className = "segcn-class";
    made.dataset.id = id;
    const swatch = make("span", "segcn-swatch");
    swatch.style.background = `rgb(${rgb.join(",")})`;
    made.append(swatch, make("span", "segcn-name", { textContent: name }));
    legend.append(made);
  }
  const search = make("input", "segcn-search", { type: "search", placeholder: "find a class" });
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const made of legend.querySelectorAll("button")) made.hidden = !made.title.toLowerCase().includes(wanted);
  });
  if (labels.length > MANY) legend.prepend(search);

  function at(event) {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * mask.width) / box.width,
      y: ((event.clientY - box.top) * mask.height) / box.height,
    };
  }

  function hover(event) {
    const { x, y } = at(event), scale = canvas.clientWidth / mask.width, inside = x >= 0 && y >= 0;
    const id = inside && x < mask.width && y < mask.height ? mask.ids[Math.floor(y) * mask.width + Math.floor(x)] : null;
    under.textContent = id === null ? "" : (names[id] ?? `id ${id}`);
    const wide = tool === "fill" ? 0 : size * scale;
    Object.assign(ring.style, { width: `${wide}px`, height: `${wide}px`, left: `${x * scale}px`, top: `${y * scale}px` });
    ring.hidden = tool === "fill";
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    root.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    before = mask.ids.slice();
    last = at(event);
    if (tool === "fill") flood(mask, last.x, last.y, chosen);
    else stamp(mask, last.x, last.y, size, color());
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    hover(event);
    if (!before || tool === "fill") return;
    const here = at(event);
    stroke(mask, last, here, size, color());
    last = here;
    draw();
  });
  for (const end of ["pointerup", "pointercancel"])
    canvas.addEventListener(end, () => {
      if (before) finish(before);
      before = null;
    });
  canvas.addEventListener("pointerleave", () => ((ring.hidden = true), (under.textContent = "")));

  root.addEventListener("keydown", (event) => {
    if (event.target === search) return;
    const key = event.key.toLowerCase(), tooled = Object.keys(TOOLS).find((name) => name[0] === key);
    if (key === "z" && (event.ctrlKey || event.metaKey)) event.shiftKey ? travel(future, past) : travel(past, future);
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (key === "[" || key === "]") setSize(size + (key === "]" ? 1 : -1));
    else if (tooled) (tool = tooled), show();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  paper.append(canvas, ring);
  const left = make("div", "segcn-left");
  left.append(paper, under);
  board.append(left, legend);
  root.append(tools, board);
  el.append(root);
  ring.hidden = true;
  for (const name of ["ids", "width", "height"]) model.on(`change:${name}`, arrived);
  arrived();
}

export default { render };
