// A mask is one byte a pixel, the class id. It is drawn without antialiasing, so no class is invented. Each change
// goes to the kernel whole and as a message of its own: a widget's state may be held back while the kernel is busy, and
// a button pressed after a stroke would then overtake it.

const STEPS_BACK = 50;
const TOOLS = {
  brush: ["Brush", "b", "draw"], line: ["Line", "l", "drag a straight line"],
  rectangle: ["Rectangle", "r", "drag a filled rectangle"], polygon: ["Polygon", "p", "click corners; Enter closes it"],
  lasso: ["Lasso", "o", "drag around an area"], fill: ["Fill", "f", "fill an area of one class"],
  pick: ["Pick", "i", "take the class under the pointer"], eraser: ["Eraser", "e", "make unlabelled"],
  hand: ["Move", "h", "move the view when zoomed in"],
};
const KEYS = [
  ...Object.values(TOOLS).map(([name, key, what]) => [key.toUpperCase(), `${name}: ${what}`]),
  ["1 ... 9", "choose a class"], [", .", "class before, class after"], ["[ ]", "smaller, larger brush"],
  ["+ - 0", "zoom in, out, fit (also Ctrl + wheel)"], ["Ctrl + Z, Y", "undo, redo"], ["Esc", "drop an open polygon"],
  ["arrows", "move a cursor"], ["Space", "pen down, pen up at the cursor"], ["Ctrl + Enter", "generate"],
  ["?", "show or hide these keys"],
];
const MANY = 16; // classes, from which on they can be searched
const CLOSE = 8; // px on the screen between a click and the first corner that closes a polygon
const FARTHEST = 32; // times larger than what fits

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

function box({ ids, width, height }, from, to, id) {
  const [left, right] = [from.x, to.x].map(Math.floor).sort((a, b) => a - b);
  const [top, bottom] = [from.y, to.y].map(Math.floor).sort((a, b) => a - b);
  for (let row = Math.max(0, top); row <= Math.min(height - 1, bottom); row++)
    ids.fill(id, row * width + Math.max(0, left), row * width + Math.min(width - 1, right) + 1);
}

function area({ ids, width, height }, corners, id) {
  for (let row = 0; row < height; row++) {
    const y = row + 0.5, crossed = []; // a pixel belongs to the area where its center does, by the even-odd rule
    corners.forEach((one, at) => {
      const two = corners[(at + 1) % corners.length];
      if (one.y > y !== two.y > y) crossed.push(one.x + ((y - one.y) * (two.x - one.x)) / (two.y - one.y));
    });
    crossed.sort((a, b) => a - b);
    for (let at = 0; at + 1 < crossed.length; at += 2) {
      const left = Math.max(0, Math.ceil(crossed[at] - 0.5)), end = Math.min(width, Math.ceil(crossed[at + 1] - 0.5));
      if (end > left) ids.fill(id, row * width + left, row * width + end);
    }
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
const make = (tag, className, more = {}) => Object.assign(document.createElement(tag), { className, ...more });
const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice(); // off its message
const read = (model) => ({ ids: bytes(model.get("ids")), width: model.get("width"), height: model.get("height") });

function offer(name, content) {
  const link = make("a", "", { href: URL.createObjectURL(new Blob([content])), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function render({ model, el }) {
  const labels = model.get("labels"), eraser = model.get("eraser");
  const names = Object.fromEntries(labels.map(({ id, name }) => [id, name]));
  const colors = new Uint32Array(256).fill(0xff000000);
  for (const { id, color: [red, green, blue] } of labels) colors[id] = 0xff000000 | (blue << 16) | (green << 8) | red;

  let mask = { ids: new Uint8Array(), width: 0, height: 0 };
  let tool = "brush", chosen = labels[0].id, picked = false, size = 1; // picked: by a person
  let before = null, start = null, last = null, corners = []; // of what is being drawn
  let view = { zoom: 1, x: 0, y: 0 }, pan = null, cursor = null;
  const past = [], future = [];

  const root = make("div", "segcn-mask-canvas"), bar = make("div", "segcn-bar"), board = make("div", "segcn-board");
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own, such as z
  const side = make("div", "segcn-side"), tools = make("div", "segcn-tools"), legend = make("div", "segcn-legend");
  const left = make("div", "segcn-left"), under = make("div", "segcn-under"), paper = make("div", "segcn-paper");
  const spoken = "mask: arrows move, Space draws, ? lists all keys";
  Object.assign(paper, { tabIndex: 0, role: "application", ariaLabel: spoken });
  const sheet = make("div", "segcn-sheet"), photo = make("img", "segcn-photo", { alt: "photo under the mask" });
  const canvas = make("canvas", "segcn-canvas"), context = canvas.getContext("2d"), ring = make("div", "segcn-ring");
  const keys = make("dl", "segcn-keys", { hidden: true, ariaLabel: "keys" });
  for (const [key, what] of KEYS)
    keys.append(make("dt", "", { textContent: key }), make("dd", "", { textContent: what }));

  // What is seen

  function draw() {
    const { ids, width, height } = mask;
    const image = context.createImageData(width, height), pixels = new Uint32Array(image.data.buffer);
    for (let at = 0; at < ids.length; at++) pixels[at] = colors[ids[at]];
    context.putImageData(image, 0, 0);
  }

  const scale = () => view.zoom * Math.min(paper.clientWidth / mask.width, paper.clientHeight / mask.height);

  function place() {
    if (!mask.width || !paper.clientWidth) return;
    const within = (at, room, side) => (side <= room ? (room - side) / 2 : Math.min(0, Math.max(room - side, at)));
    view.x = within(view.x, paper.clientWidth, mask.width * scale());
    view.y = within(view.y, paper.clientHeight, mask.height * scale());
    sheet.style.transform = `translate(${view.x}px, ${view.y}px) scale(${scale()})`;
    zoomed.textContent = `${Math.round(100 * scale())} %`;
    ring.hidden = true;
  }

  function zoom(factor, x = paper.clientWidth / 2, y = paper.clientHeight / 2) {
    const old = scale();
    view.zoom = Math.min(FARTHEST, Math.max(1, view.zoom * factor));
    view.x = x - ((x - view.x) * scale()) / old;
    view.y = y - ((y - view.y) * scale()) / old;
    place();
  }

  function fit() {
    const { width, height } = mask, longer = Math.max(width, height);
    Object.assign(canvas, { width, height });
    Object.assign(sheet.style, { width: `${width}px`, height: `${height}px` });
    slider.max = Math.max(8, Math.round(longer / 3));
    setSize(Math.max(1, Math.round(longer / 16)));
    view = { zoom: 1, x: 0, y: 0 };
    cursor = { x: Math.floor(width / 2) + 0.5, y: Math.floor(height / 2) + 0.5 };
    past.length = future.length = 0;
    place();
  }

  function show() {
    draw();
    undo.disabled = !past.length;
    redo.disabled = !future.length;
    paper.dataset.tool = tool;
    for (const button of root.querySelectorAll("[data-tool]")) press(button, button.dataset.tool === tool);
    for (const button of legend.querySelectorAll("button")) press(button, Number(button.dataset.id) === chosen);
  }

  function hover({ x, y }) {
    const inside = x >= 0 && y >= 0 && x < mask.width && y < mask.height;
    const id = inside ? mask.ids[Math.floor(y) * mask.width + Math.floor(x)] : null;
    under.textContent = id === null ? "" : `${names[id] ?? `id ${id}`}  (${Math.floor(x)}, ${Math.floor(y)})`;
    const wide = (["brush", "eraser", "line"].includes(tool) ? size : 1) * scale();
    const [across, down] = [view.x + x * scale(), view.y + y * scale()];
    Object.assign(ring.style, { width: `${wide}px`, height: `${wide}px`, left: `${across}px`, top: `${down}px` });
    ring.hidden = tool === "hand";
  }

  const press = (button, on) => button.setAttribute("aria-pressed", on);
  const color = () => (tool === "eraser" ? eraser : chosen);

  // What is kept and sent

  function send() {
    model.set("ids", new DataView(mask.ids.slice().buffer)); // for other views of this page
    model.send({ kind: "drawn", width: mask.width, height: mask.height }, undefined, [mask.ids.slice().buffer]);
  }

  function keep(old) {
    if (same(old, mask.ids)) return false;
    past.push(old);
    if (past.length > STEPS_BACK) past.shift();
    future.length = 0;
    return true;
  }

  function finish() {
    const old = before;
    before = null;
    corners = [];
    if (keep(old)) send();
    show();
  }

  function drop() {
    if (before) mask.ids = before;
    before = null;
    corners = [];
    show();
  }

  function travel(from, to) {
    if (before) return drop();
    if (!from.length) return;
    to.push(mask.ids);
    mask.ids = from.pop();
    send();
    show();
  }

  function arrived() {
    const found = read(model), sized = found.width === mask.width && found.height === mask.height;
    if (found.ids.length !== found.width * found.height || !found.ids.length) return;
    if (sized && same(found.ids, mask.ids)) return;
    const old = before ?? mask.ids;
    mask = found;
    before = null; // what was being drawn was on the old one
    corners = [];
    if (sized) keep(old);
    else fit();
    if (!picked || mask.ids.every((id) => id === chosen)) chosen = rarest();
    show();
    canvas.dataset.ready = "true";
  }

  function rarest() { // the class with the fewest pixels: drawn with it, the first stroke is seen
    const pixels = new Uint32Array(256);
    for (const id of mask.ids) pixels[id]++;
    const ids = labels.map(({ id }) => id).filter((id) => id !== eraser);
    return ids.reduce((one, other) => (pixels[other] < pixels[one] ? other : one), ids[0] ?? eraser);
  }

  // Drawing, by pointer and by keys: down, move and up at places of the mask

  function again(change) {
    mask.ids = before.slice();
    change();
    draw();
  }

  const outline = () => corners.forEach((one, at) => at && stroke(mask, corners[at - 1], one, 1, color()));

  function close() {
    if (corners.length > 2) again(() => area(mask, corners, color()));
    else mask.ids = before;
    finish();
  }

  function down(at) {
    if (tool === "pick") {
      const id = mask.ids[Math.floor(at.y) * mask.width + Math.floor(at.x)];
      return labels.some((label) => label.id === id) && choose(id);
    }
    if (tool === "polygon" && before) {
      const reach = CLOSE / scale(), [first] = corners;
      if (corners.length > 2 && Math.hypot(at.x - first.x, at.y - first.y) < reach) return close();
    } else before = mask.ids.slice();
    start = last = at;
    if (tool === "fill") flood(mask, at.x, at.y, color());
    else if (tool === "polygon" || tool === "lasso") {
      corners.push(at);
      again(() => (outline(), stamp(mask, at.x, at.y, 1, color())));
    } else if (tool === "rectangle") box(mask, at, at, color());
    else stamp(mask, at.x, at.y, size, color());
    draw();
    if (tool === "fill") finish();
  }

  function move(at) {
    if (!before) return;
    if (tool === "line") again(() => stroke(mask, start, at, size, color()));
    else if (tool === "rectangle") again(() => box(mask, start, at, color()));
    else if (tool === "lasso") corners.push(at), again(outline);
    else if (tool === "polygon") again(() => (outline(), stroke(mask, corners.at(-1), at, 1, color())));
    else stroke(mask, last, at, size, color()), draw();
    last = at;
  }

  function up() {
    if (!before || tool === "polygon") return;
    tool === "lasso" ? close() : finish();
  }

  function choose(id) {
    if (before) drop();
    chosen = id;
    picked = true;
    if (tool === "eraser" || tool === "pick") tool = "brush";
    show();
  }

  function use(name) {
    if (before) drop();
    tool = name;
    show();
  }

  function setSize(value) {
    size = Math.min(Math.max(1, value), Number(slider.max));
    slider.value = size;
    number.textContent = `${size} px`;
  }

  // The controls

  function button(text, title, action) {
    const made = make("button", "segcn-tool", { type: "button", textContent: text, title });
    made.addEventListener("click", action);
    return made;
  }

  for (const [name, [text, key, what]] of Object.entries(TOOLS)) {
    const made = button(text, `${text} (${key.toUpperCase()}): ${what}`, () => use(name));
    made.dataset.tool = name;
    tools.append(made);
  }
  const range = (title, more) => make("input", "segcn-range", { type: "range", title, ariaLabel: title, ...more });
  const slider = range("size of brush, line and eraser", { min: 1 }), number = make("span", "segcn-number");
  slider.addEventListener("input", () => setSize(Number(slider.value)));
  const undo = button("Undo", "Undo (Ctrl+Z)", () => travel(past, future));
  const redo = button("Redo", "Redo (Ctrl+Y)", () => travel(future, past));
  const clear = button("Clear", `All to ${names[eraser]}`, () => {
    drop();
    before = mask.ids.slice();
    mask.ids.fill(eraser);
    finish();
  });
  const zoomed = button("", "Fit the view (0)", () => ((view.zoom = 1), place()));
  const help = button("Keys", "List of the keys (?)", () => press(help, !(keys.hidden = !keys.hidden)));
  const nearer = button("+", "Zoom in (+)", () => zoom(1.5));
  const farther = button("\u2212", "Zoom out (-)", () => zoom(1 / 1.5));
  const seen = range("how much of the photo shows", { min: 0, max: 100, value: 50, hidden: true });
  const through = () => (canvas.style.opacity = seen.hidden ? 1 : 1 - seen.value / 100);
  seen.addEventListener("input", through);
  bar.append(slider, number, undo, redo, clear, farther, zoomed, nearer, help, seen);

  for (const { id, name, color: rgb } of labels) {
    const made = button("", `${name} (id ${id})`, () => choose(id));
    made.className = "segcn-class";
    made.dataset.id = id;
    const swatch = make("span", "segcn-swatch");
    swatch.style.background = `rgb(${rgb.join(",")})`;
    made.append(swatch, make("span", "segcn-name", { textContent: name }));
    legend.append(made);
  }
  const finds = "find a class";
  const search = make("input", "segcn-search", { type: "search", placeholder: finds, ariaLabel: finds });
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const made of legend.querySelectorAll("button")) made.hidden = !made.title.toLowerCase().includes(wanted);
  });
  if (labels.length > MANY) legend.prepend(search);

  function at(event) {
    const { left: x, top: y } = paper.getBoundingClientRect();
    return { x: (event.clientX - x - view.x) / scale(), y: (event.clientY - y - view.y) / scale() };
  }

  paper.addEventListener("pointerdown", (event) => {
    paper.focus({ preventScroll: true });
    const pans = event.button === 1 || (event.button === 0 && tool === "hand");
    if (pans) pan = { x: event.clientX - view.x, y: event.clientY - view.y };
    else if (event.button === 0) down(at(event));
    else return;
    paper.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  paper.addEventListener("pointermove", (event) => {
    if (pan) Object.assign(view, { x: event.clientX - pan.x, y: event.clientY - pan.y }), place();
    else hover((cursor = at(event))), move(cursor);
  });
  for (const end of ["pointerup", "pointercancel"]) paper.addEventListener(end, () => (pan ? (pan = null) : up()));
  paper.addEventListener("dblclick", () => before && tool === "polygon" && close());
  paper.addEventListener("pointerleave", () => ((ring.hidden = true), (under.textContent = "")));
  paper.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    const { left: x, top: y } = paper.getBoundingClientRect();
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, event.clientX - x, event.clientY - y);
  }, { passive: false });

  function stepCursor(across, downward) {
    const far = Math.max(1, Math.round(size / 4));
    cursor.x = Math.min(mask.width - 0.5, Math.max(0.5, cursor.x + across * far));
    cursor.y = Math.min(mask.height - 0.5, Math.max(0.5, cursor.y + downward * far));
    hover(cursor);
    move({ ...cursor });
  }

  const order = labels.map((label) => label.id);
  const neighbor = (by) => choose(order[(order.indexOf(chosen) + by + order.length) % order.length]);
  const ACTIONS = {
    "[": () => setSize(size - 1), "]": () => setSize(size + 1), "+": () => zoom(1.5), "=": () => zoom(1.5),
    "-": () => zoom(1 / 1.5), 0: () => zoomed.click(), "?": () => help.click(), escape: drop, ",": () => neighbor(-1),
    ".": () => neighbor(1),
  };
  Object.entries(TOOLS).forEach(([name, [, key]]) => (ACTIONS[key] = () => use(name)));
  order.slice(0, 9).forEach((id, at) => (ACTIONS[at + 1] = () => choose(id)));
  const ON_PAPER = { // with the focus on the mask: elsewhere these keys belong to buttons and sliders
    arrowleft: () => stepCursor(-1, 0), arrowright: () => stepCursor(1, 0), arrowup: () => stepCursor(0, -1),
    arrowdown: () => stepCursor(0, 1), enter: () => before && tool === "polygon" && close(),
    " ": () => (before && tool !== "polygon" ? up() : down({ ...cursor })),
  };

  root.addEventListener("keydown", (event) => {
    if (event.target === search) return;
    const key = event.key.toLowerCase(), held = event.ctrlKey || event.metaKey;
    if (held && key === "z") event.shiftKey ? travel(future, past) : travel(past, future);
    else if (held && key === "y") travel(future, past);
    else if (held || event.altKey) return;
    else if (event.target === paper && ON_PAPER[key]) ON_PAPER[key]();
    else if (ACTIONS[key]) ACTIONS[key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  function wanted(event) { // Ctrl+Enter anywhere in the panel
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    if (!el.closest(".segcn-panel")?.contains(event.target)) return;
    event.preventDefault();
    event.stopPropagation();
    model.send({ kind: "generate" });
  }

  function photographed() {
    const content = model.get("photo");
    URL.revokeObjectURL(photo.src);
    seen.hidden = !content?.byteLength;
    photo.hidden = seen.hidden;
    if (!seen.hidden) photo.src = URL.createObjectURL(new Blob([bytes(content)]));
    through();
  }

  sheet.append(photo, canvas);
  paper.append(sheet, ring, keys);
  left.append(bar, paper, under);
  side.append(tools, legend);
  board.append(side, left);
  root.append(board);
  el.append(root);
  ring.hidden = true;
  const sized = new ResizeObserver(place);
  sized.observe(paper);
  document.addEventListener("keydown", wanted, true);
  for (const name of ["ids", "width", "height"]) model.on(`change:${name}`, arrived);
  model.on("change:photo", photographed);
  model.on("msg:custom", (content, buffers) => content.kind === "download" && offer(content.name, buffers[0]));
  photographed();
  arrived();
  return () => {
    sized.disconnect();
    document.removeEventListener("keydown", wanted, true);
  };
}

export default { render };
