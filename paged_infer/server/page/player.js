"use strict";
// Playback: which moment of a history is shown, how fast it goes on, and in words what its step does.

const $ = id => document.getElementById(id);
const MOST_NAMES = 8;

function list(texts) {
  const some = texts.slice(0, MOST_NAMES).join(", ");
  return texts.length > MOST_NAMES ? `${some} and ${texts.length - MOST_NAMES} more` : some;
}

const names = ids => list(ids.map(id => `S${id}`));

// What the last record did to the pool, in words.
function happened(pool) {
  const {record} = pool, parts = [], of = kind => record.events.filter(event => event[0] === kind);
  const find = id => pool.sequences.get(id) ?? pool.ended.get(id);
  const [first, again] = [[], []];  // prompts, and what has been computed before
  for (const [id, count, isPrefill] of record.scheduled) {
    const one = find(id), to = one ? one.computed + one.writes : 0;
    if (!isPrefill || !one) continue;
    if (one.lost) again.push(`S${id} (${count} tokens)`);
    else first.push(`S${id} (${count}${to < one.prompt || count < one.prompt ? `, now ${to} of ${one.prompt}` : ""})`);
  }
  if (first.length) parts.push(`prefill of ${list(first)}`);
  if (again.length) parts.push(`computed again: ${list(again)}`);
  const decoding = record.scheduled.filter(([, , isPrefill]) => !isPrefill).map(([id]) => id);
  if (decoding.length) parts.push(`decode of ${names(decoding)}`);
  const arrived = of("arrive").map(([, id]) => id), ended = of("end");
  if (arrived.length) parts.push(`${names(arrived)} ${arrived.length > 1 ? "arrive" : "arrives"}`);
  for (const [, id, count] of of("adopt")) parts.push(`S${id} finds ${count} tokens in the prefix cache`);
  for (const [, id, parent, count] of of("fork")) parts.push(`S${id} shares ${count} tokens with S${parent}`);
  for (const [, id, state] of of("transition")) {
    const from = find(id)?.from;
    if (state === "swapped") parts.push(`S${id} is preempted: its blocks move to swap space`);
    if (state === "waiting") parts.push(`S${id} is preempted: it gives up its blocks, and must compute them again`);
    if (state === "running" && from === "swapped") parts.push(`S${id} returns from swap space`);
  }
  if (record.copies) parts.push(`${record.copies} shared ${record.copies > 1 ? "blocks are" : "block is"} copied before being written`);
  for (const [, id, reason] of ended) parts.push(`S${id} has ended (${reason})`);
  const total = record.numTokens[0] + record.numTokens[1];
  const head = record.step === null ? "Between steps" : `Step ${number(record.step)}, ${number(total)} token${total === 1 ? "" : "s"}`;
  return `${head}: ${parts.join("; ") || "nothing new"}.`;
}

class Player {
  constructor(onFrame) {
    this.onFrame = onFrame;
    this.isLive = true;
    this.isPlaying = true;
    this.history = null;
    this.credit = 0;  // steps that are due, as a fraction
    this.lastMs = null;
    $("play").onclick = () => this.play(!this.isPlaying);
    $("back").onclick = () => { this.play(false); this.move(() => this.history.back()); };
    $("forward").onclick = () => { this.play(false); this.move(() => this.history.forward()); };
    $("scrub").oninput = () => { this.play(false); this.move(() => this.history.seek($("scrub").valueAsNumber)); };
    $("speed").onchange = () => this.play(true);
    $("timeline").onclick = event => {
      const share = (event.offsetX - 8) / ($("timeline").clientWidth - 16);
      this.play(false);
      this.move(() => this.history.seek(Math.ceil(this.history.first + share * this.history.records.length)));
    };
    new ResizeObserver(() => this.drawTimeline()).observe($("timeline"));
  }

  get speed() { return Number($("speed").value); }  // steps a second
  get isAtEnd() { return this.history.position === this.history.end; }

  open(history, isLive, isPlaying) {
    [this.history, this.isLive, this.credit] = [history, isLive, 0];
    this.play(isPlaying);
    this.frame();
  }

  play(isPlaying) {
    if (isPlaying && this.history && !this.isLive && this.isAtEnd) this.history.seek(this.history.first);
    this.isPlaying = isPlaying;
    $("play").textContent = isPlaying ? "Pause" : "Play";
    this.goOn();
  }

  move(change) {
    if (!this.history) return;
    change();
    this.frame();
  }

  goOn() {  // there may be something to play
    if (this.lastMs !== null || !this.isPlaying || !this.history) return;
    this.lastMs = performance.now();
    requestAnimationFrame(ms => this.tick(ms));
  }

  tick(ms) {
    const passed = Math.min(0.25, Math.max(0, ms - this.lastMs) / 1000);
    this.lastMs = null;
    if (!this.isPlaying) return;
    if (this.isAtEnd) {
      if (!this.isLive) this.play(false);
      return this.frame();
    }
    if (this.speed === Infinity) this.history.seek(this.history.end);
    for (this.credit += passed * this.speed; this.credit >= 1 && this.speed < Infinity; this.credit--) {
      if (!this.history.forward()) break;
    }
    if (!(this.credit < 1)) this.credit = 0;
    this.frame();
    this.goOn();
  }

  appended() {  // the live history has new records
    this.goOn();
    this.frame();
  }

  frame() {
    const {history} = this, {pool, position} = history;
    $("scrub").min = history.first;
    $("scrub").max = history.end;
    $("scrub").value = position;
    const {step} = pool, left = history.records.slice(position - history.first).filter(isStep).length;
    const ahead = this.isLive ? (left ? `, ${number(left)} behind the server` : ", now") : `, ${number(left)} to come`;
    $("where").textContent = history.end > history.first ? (step === null ? "before the first step" : `step ${number(step)}`) + ahead : "";
    $("scrub").setAttribute("aria-valuetext", $("where").textContent);
    $("happens").textContent = pool.record ? happened(pool) : "Nothing has happened yet.";
    $("happens").setAttribute("aria-live", this.isPlaying ? "off" : "polite");
    this.drawTimeline();
    this.onFrame(pool, position);
  }

  drawTimeline() {  // the tokens of each step, as bars: those of prompts above those that are decoded
    const canvas = $("timeline"), width = canvas.clientWidth, height = canvas.clientHeight, scale = window.devicePixelRatio || 1;
    if (!this.history || !width) return;
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    const pen = canvas.getContext("2d"), {records, first, position} = this.history;
    pen.scale(scale, scale);
    const bars = Math.max(1, Math.min(records.length, Math.floor((width - 16) / 2))), wide = (width - 16) / bars;
    const [prefill, decode] = [new Array(bars).fill(0), new Array(bars).fill(0)], preempted = new Set();
    records.forEach((record, index) => {
      const bar = Math.floor(index * bars / records.length);
      prefill[bar] = Math.max(prefill[bar], record.numTokens[1]);
      decode[bar] = Math.max(decode[bar], record.numTokens[0]);
      if (record.preempted) preempted.add(bar);
    });
    const most = Math.sqrt(Math.max(16, ...prefill.map((count, i) => count + decode[i])));
    const tall = count => Math.sqrt(count) / most * (height - 9);  // roots: a prompt has many times a decode's tokens
    for (let bar = 0; bar < bars; bar++) {
      const x = 8 + bar * wide, bottom = tall(decode[bar]), top = tall(decode[bar] + prefill[bar]);
      pen.globalAlpha = bar < (position - first) * bars / Math.max(1, records.length) ? 1 : 0.3;
      pen.fillStyle = themed("decode");
      pen.fillRect(x, height - bottom, Math.max(1, wide - 0.5), bottom);
      pen.fillStyle = themed("prefill");
      pen.fillRect(x, height - top, Math.max(1, wide - 0.5), top - bottom);
      if (!preempted.has(bar)) continue;
      pen.fillStyle = themed("preempted");
      pen.beginPath();
      pen.arc(x + wide / 2, 4, 3, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    pen.fillStyle = themed("ink");
    pen.fillRect(8 + (position - first) / Math.max(1, records.length) * (width - 16) - 0.5, 0, 1, height);
  }
}
