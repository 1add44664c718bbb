// The heat map of experts: a canvas for the eye, a cell to walk through by keys, a table and a
// sentence for all others. States are those of proto/compute_node.proto.
const STATES = [["absent", "on the disk"], ["resident", "in memory"], ["used", "used now"], ["read", "being read"], ["foreseen", "foreseen"]];
const ORDER = [2, 1, 3, 4, 0];  // of the legend and the table
const MOST_ROW_PX = 22, LEAST_ROW_PX = 5, LABEL_PX = 26;
const at = (id) => document.getElementById(id);

function count(states, state) {
  let found = 0;
  for (const digit of states) found += digit === state;
  return found;
}

export class HeatMap {
  constructor() {
    this.canvas = at("heat");
    this.rows = [];
    this.cell = null;  // [row, column] that the keys are at
    at("legend").append(...ORDER.map((state) => {
      const item = document.createElement("li"), mark = document.createElement("i");
      mark.className = STATES[state][0];
      item.append(mark, STATES[state][1]);
      return item;
    }));
    at("heat-table").tHead.innerHTML = "<tr><th scope=col>Layer</th></tr>";
    at("heat-table").tHead.rows[0].append(...ORDER.map((state) => {
      const head = document.createElement("th");
      head.scope = "col";
      head.textContent = STATES[state][1];
      return head;
    }));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("focus", () => this.go(this.cell ?? [0, 0]));
    this.canvas.addEventListener("blur", () => this.go(null));
    this.canvas.addEventListener("pointerleave", () => document.activeElement === this.canvas || this.go(null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }

  show(rows) {
    this.rows = rows;
    this.draw();
    this.tell();
    this.summarise();
  }

  get columns() {
    return this.rows[0]?.states.length ?? 0;
  }

  summarise() {
    const all = this.rows.map((row) => row.states).join("");
    const num = (state) => count(all, String(state)).toLocaleString("en");
    const used = count(all, "1") + count(all, "2");
    at("heat-summary").textContent = all
      ? `Of ${all.length.toLocaleString("en")} experts in ${this.rows.length} layers, ${used.toLocaleString("en")} are in memory; the latest token of each layer used ${num(2)} of them. Being read: ${num(3)}; foreseen: ${num(4)}.`
      : "The node does not say what its experts do.";
    if (!at("heat-table").closest("details").open) return;
    at("heat-table").tBodies[0].replaceChildren(...this.rows.map((row) => {
      const line = document.createElement("tr"), head = document.createElement("th");
      head.scope = "row";
      head.textContent = row.layer;
      line.append(head, ...ORDER.map((state) => {
        const cell = document.createElement("td");
        cell.textContent = count(row.states, String(state));
        return cell;
      }));
      return line;
    }));
  }

  // Width and height of a cell, in CSS pixels.
  get size() {
    const width = (this.canvas.parentElement.clientWidth - this.padding - LABEL_PX) / Math.max(1, this.columns);
    return [width, Math.max(LEAST_ROW_PX, Math.min(MOST_ROW_PX, width))];
  }

  get padding() {
    const style = getComputedStyle(this.canvas.parentElement);
    return parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
  }

  draw() {
    const [width, height] = this.size, scale = devicePixelRatio || 1;
    const total = [LABEL_PX + width * this.columns, height * this.rows.length];
    this.canvas.style.height = `${total[1]}px`;
    [this.canvas.width, this.canvas.height] = total.map((px) => Math.round(px * scale));
    const pen = this.canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colours = STATES.map(([name]) => style.getPropertyValue(`--${name}`));
    pen.scale(scale, scale);
    const gap = width > 4 ? 1 : 0.25;
    this.rows.forEach((row, y) => {
      for (let x = 0; x < this.columns; x += 1) {
        pen.fillStyle = colours[row.states[x]];
        pen.fillRect(LABEL_PX + x * width, y * height, width - gap, height - gap);
      }
    });
    this.label(pen, style.getPropertyValue("--soft"), height);
    this.frame(pen, style.getPropertyValue("--text"), width, height);
  }

  label(pen, colour, height) {
    const every = Math.ceil(12 / height);
    pen.fillStyle = colour;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    this.rows.forEach((row, y) => y % every === 0 && pen.fillText(row.layer, 0, (y + 0.5) * height));
  }

  frame(pen, colour, width, height) {
    if (!this.cell) return;
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect(LABEL_PX + this.cell[1] * width, this.cell[0] * height, width, height);
  }

  walk(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step || !this.columns) return;
    event.preventDefault();
    const [row, column] = this.cell ?? [0, 0];
    const bound = (value, most) => Math.max(0, Math.min(most - 1, value));
    this.go([bound(row + step[0], this.rows.length), bound(column + step[1], this.columns)]);
  }

  point(event) {
    const [width, height] = this.size, box = this.canvas.getBoundingClientRect();
    const cell = [Math.floor((event.clientY - box.top) / height), Math.floor((event.clientX - box.left - LABEL_PX) / width)];
    const isNew = String(cell) !== String(this.cell);
    if (isNew && cell[0] in this.rows && cell[1] >= 0 && cell[1] < this.columns) this.go(cell);
  }

  go(cell) {
    this.cell = cell;
    this.draw();
    this.tell();
  }

  tell() {
    const row = this.cell && this.rows[this.cell[0]];
    const text = row ? `Layer ${row.layer}, expert ${this.cell[1]}: ${STATES[row.states[this.cell[1]]][1]}` : "";
    if (at("heat-cell").textContent !== text) at("heat-cell").textContent = text;
  }
}
