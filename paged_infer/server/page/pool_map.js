"use strict";
// The map of the pool: a cell for each block, coloured by the sequences that hold it. Of a large pool it draws the rows
// that are in use, and a strip above shows where they are.

const OWNERS = ["#77aadd", "#ee8866", "#bbcc33", "#ffaabb", "#99ddff", "#eedd88", "#44bb99", "#b07aa1"];
const ON_OWNER = "#22303c";  // text and lines on these colours, in both themes
const COLUMNS = [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640];
const LARGEST = [56, 28], FLATNESS = 0.62, MOST_BANDS = 4, GAP = 10;
const WHOLE_UP_TO = 256;  // blocks: smaller pools are drawn whole
const REMEMBERED = 64;    // records for which a block that is free again stays in view

const colour = owner => OWNERS[owner % OWNERS.length];
const number = value => Math.round(value).toLocaleString("en");
const themed = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function mixed(one, other, share) {  // of two colours "#rrggbb"
  const parts = [one, other].map(text => text.match(/\w\w/g).map(part => parseInt(part, 16)));
  return `rgb(${parts[0].map((part, i) => Math.round(part * share + parts[1][i] * (1 - share))).join(",")})`;
}

class PoolMap {
  constructor(canvas, strip, onChosen) {
    [this.canvas, this.strip, this.onChosen] = [canvas, strip, onChosen];
    this.pen = canvas.getContext("2d");
    this.isWhole = false;   // draw all blocks of a large pool, too
    this.chosen = null;
    this.reset();
    canvas.onmousemove = event => this.choose(this.blockAt(event.offsetX, event.offsetY));
    canvas.onclick = canvas.onmousemove;
    canvas.onkeydown = event => this.onKey(event);
    new ResizeObserver(() => { this.columns = 0; this.draw(); }).observe(canvas);
  }

  reset() {  // another pool
    [this.pool, this.cells, this.seen, this.columns, this.rows] = [null, new Map(), new Map(), 0, []];
  }

  show(pool, position) {
    [this.pool, this.cells] = [pool, pool.held()];
    for (const block of this.cells.keys()) this.seen.set(block, position);
    if (this.cells.size) {
      for (const [block, at] of this.seen) if (Math.abs(position - at) > REMEMBERED) this.seen.delete(block);
    }
    this.draw();
  }

  get isPart() { return !this.isWhole && this.pool.numBlocks > WHOLE_UP_TO; }

  // The first blocks of the rows to draw, with so many columns.
  rowsOf(columns) {
    const last = Math.ceil(this.pool.numBlocks / columns);
    if (!this.isPart) return Array.from({length: last}, (_, row) => row);
    const rows = new Set([...this.seen.keys()].map(block => Math.floor(block / columns)));
    for (let row = 0; rows.size < 3 && row < last; row++) rows.add(row);
    return [...rows].sort((a, b) => a - b);
  }

  layOut() {
    this.margin = 14 + 6.5 * number(this.pool.numBlocks).length;  // for the numbers of blocks
    const width = this.canvas.clientWidth - this.margin, tallest = parseInt(themed("map-height"));
    for (const columns of COLUMNS) {
      if (columns < this.columns || columns * LARGEST[0] < width) continue;  // zooming in waits until nothing is held
      const cell = Math.min(LARGEST[0], width / columns), height = Math.min(LARGEST[1], FLATNESS * cell);
      const rows = this.rowsOf(columns);
      let y = 0;
      this.rows = rows.map((row, i) => {
        if (i && row !== rows[i - 1] + 1) y += Math.min(GAP, height);
        y += height;
        return {first: row * columns, y: y - height};
      });
      [this.columns, this.cell, this.height, this.total] = [columns, cell, height, y];
      if (y <= tallest) break;
    }
  }

  draw() {
    if (!this.pool || !this.canvas.clientWidth) return;
    if (!this.cells.size) this.columns = 0;
    this.layOut();
    const {canvas, pen, cell, height} = this, scale = window.devicePixelRatio || 1;
    const wide = Math.round(canvas.clientWidth * scale), tall = Math.ceil((this.total + 1) * scale);
    if (canvas.width !== wide || canvas.height !== tall) {
      [canvas.width, canvas.height] = [wide, tall];
      canvas.style.height = `${tall / scale}px`;
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, wide, tall);
    [this.ink, this.faint, this.cached, this.paper] = ["ink", "faint", "cached", "paper"].map(themed);
    const every = Math.ceil(14 / height);  // rows from one number to the next
    this.rows.forEach(({first, y}, index) => {
      const isAfterGap = index && first !== this.rows[index - 1].first + this.columns;
      if (isAfterGap) this.drawGap(y, Math.min(GAP, height));
      if (index % every === 0 || isAfterGap) {
        pen.font = "11px system-ui, sans-serif";
        [pen.textAlign, pen.textBaseline, pen.fillStyle] = ["right", "middle", themed("quiet")];
        pen.fillText(number(first), this.margin - 5, Math.max(6, y + height / 2));
      }
      const last = Math.min(this.pool.numBlocks, first + this.columns);
      for (let block = first; block < last; block++) this.drawCell(block, this.margin + (block - first) * cell, y);
    });
    this.drawStrip(scale);
  }

  drawGap(y, gap) {
    const {pen} = this;
    pen.strokeStyle = this.faint;
    pen.setLineDash([2, 4]);
    pen.beginPath();
    pen.moveTo(this.margin, y - gap / 2);
    pen.lineTo(this.margin + this.columns * this.cell, y - gap / 2);
    pen.stroke();
    pen.setLineDash([]);
  }

  drawCell(block, left, top) {
    const {pen, cell} = this, gap = cell > 8 ? 1.2 : cell > 4 ? 0.5 : 0;
    const x = left + gap, y = top + gap, w = cell - 2 * gap, h = this.height - 2 * gap;
    const held = this.cells.get(block), hashed = this.pool.hashed.has(block);
    pen.lineWidth = 1;
    if (!held) {
      pen.fillStyle = pen.strokeStyle = hashed ? this.cached : this.faint;
      hashed || cell <= 4 ? pen.fillRect(x, y, hashed ? w : w / 2, hashed ? h : h / 2) : pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    } else {
      const {owners, tokens, from, to} = held, bands = owners.slice(0, MOST_BANDS), slot = w / this.pool.blockSize;
      bands.forEach((owner, band) => {
        const begin = y + h * band / bands.length, tall = h / bands.length;
        pen.fillStyle = mixed(colour(owner), this.paper, 0.3);
        pen.fillRect(x, begin, w, tall);
        pen.fillStyle = colour(owner);
        pen.fillRect(x, begin, slot * tokens, tall);
      });
      if (to > from) {  // written by this step
        pen.fillStyle = mixed(colour(owners[0]), ON_OWNER, 0.35);
        pen.fillRect(x + slot * from, y + h - Math.max(2, h / 4), slot * (to - from), Math.max(2, h / 4));
      }
      pen.strokeStyle = this.ink;
      if (owners.length > 1) pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
      if (hashed && cell > 8) {
        const corner = Math.min(7, 0.4 * h);
        pen.fillStyle = tokens === this.pool.blockSize ? ON_OWNER : this.ink;
        pen.beginPath();
        pen.moveTo(x + w - corner, y); pen.lineTo(x + w, y); pen.lineTo(x + w, y + corner);
        pen.fill();
      }
      if (cell >= 26 && h >= 12) this.drawName(owners, tokens > this.pool.blockSize / 2, x + w / 2, y + h / 2 - 1);
    }
    if (block === this.chosen) {
      [pen.strokeStyle, pen.lineWidth] = [this.ink, 2];
      pen.strokeRect(left + 1, top + 1, Math.max(2, cell - 2), Math.max(2, this.height - 2));
    }
  }

  drawName(owners, isOnColour, x, y) {
    const {pen} = this, name = owners.length > 1 ? `×${owners.length}` : `S${owners[0]}`;
    pen.font = "11px system-ui, sans-serif";
    [pen.textAlign, pen.textBaseline, pen.lineWidth] = ["center", "middle", 3];
    // An outline keeps the name legible over two colours.
    pen.strokeStyle = isOnColour ? "rgba(255,255,255,.5)" : mixed(colour(owners[0]), this.paper, 0.3);
    pen.strokeText(name, x, y);
    pen.fillStyle = isOnColour ? ON_OWNER : this.ink;
    pen.fillText(name, x, y);
  }

  drawStrip(scale) {  // the whole pool as a line, with what is in use
    const {strip} = this, width = strip.clientWidth;
    strip.hidden = !this.isPart;
    if (strip.hidden || !width) return;
    [strip.width, strip.height] = [Math.round(width * scale), Math.round(8 * scale)];
    const pen = strip.getContext("2d");
    pen.scale(scale, scale);
    pen.fillStyle = this.faint;
    pen.fillRect(0, 2, width, 4);
    for (const [block, {owners}] of this.cells) {
      pen.fillStyle = colour(owners[0]);
      pen.fillRect(Math.min(width - 2, width * block / this.pool.numBlocks), 0, 2, 8);
    }
  }

  // ---- one block ----

  blockAt(x, y) {
    const row = this.rows.find(one => y >= one.y && y < one.y + this.height), column = Math.floor((x - this.margin) / this.cell);
    return row && column >= 0 && column < this.columns ? row.first + column : null;
  }

  choose(block) {
    if (!this.pool || block === null || block < 0 || block >= this.pool.numBlocks || block === this.chosen) return;
    this.chosen = block;
    this.draw();
    this.onChosen(block);
  }

  onKey(event) {
    const steps = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns};
    if (!this.rows.length || !(event.key in steps)) return;
    event.preventDefault();
    if (this.chosen === null) return this.choose(this.rows[0].first);
    const row = this.rows.findIndex(one => this.chosen >= one.first && this.chosen < one.first + this.columns);
    const by = Math.sign(steps[event.key]), next = this.chosen + steps[event.key];
    if (row < 0) return this.choose(this.rows[0].first);
    const isInRow = next >= this.rows[row].first && next < this.rows[row].first + this.columns;
    const other = this.rows[row + by];  // rows that are not drawn are skipped
    if (isInRow) return this.choose(next);
    if (!other) return;
    if (Math.abs(steps[event.key]) === 1) return this.choose(by > 0 ? other.first : other.first + this.columns - 1);
    this.choose(other.first + this.chosen - this.rows[row].first);
  }

  describe(block) {
    const held = this.cells.get(block), found = this.pool.hashed.has(block) ? ", in the prefix cache" : "";
    if (!held) return `Block ${number(block)}: free${found}.`;
    const names = held.owners.map(owner => `S${owner}`).join(", ");
    return `Block ${number(block)}: held by ${names}, ${held.tokens} of ${this.pool.blockSize} slots filled${found}.`;
  }
}
