"use strict";
// The pool and the queues at one moment, rebuilt from a snapshot and the records after it (records.py, and
// control/trace_step.py for the events). control.trace.Replay is the same in Python; a test compares the two.

class Pool {
  constructor({stats, block_size, sequences, hashed}) {
    this.numBlocks = stats.num_blocks;
    this.blockSize = block_size;
    this.hashed = new Set(hashed);
    this.sequences = new Map();  // by id, those that have not ended or still hold blocks; entries are never changed
    this.ended = new Map();      // by id, the newest of the others
    this.counts = {hits: stats.prefix_hit_tokens, looked_up: stats.prefix_query_tokens, preemptions: stats.preemptions,
                   copies: stats.blocks_copied, evictions: stats.evictions,
                   swapped_out: stats.blocks_swapped_out, swapped_in: stats.blocks_swapped_in};
    this.record = null;          // the last one applied
    this.step = null;            // the number of the last step applied
    for (const one of sequences) {
      this.sequences.set(one.id, {
        id: one.id, request: one.request, prompt: one.num_prompt_tokens, state: one.state, table: one.table,
        computed: one.num_computed_tokens,  // tokens stored before this step
        writes: 0,                          // and by it
        isPrefill: false,
        furthest: one.num_computed_tokens,  // the most that were ever stored
        lost: false,                        // preempted, and computing them again
      });
    }
  }

  clone() {
    const copy = Object.assign(Object.create(Pool.prototype), this);
    copy.sequences = new Map(this.sequences);
    copy.ended = new Map(this.ended);
    copy.hashed = new Set(this.hashed);
    copy.counts = {...this.counts};
    return copy;
  }

  change(id, changes) {
    const one = this.sequences.get(id);
    if (one) this.sequences.set(id, {...one, ...changes});
  }

  apply(record) {
    this.finishStep();
    this.record = record;
    this.step = record.step ?? this.step;
    for (const [kind, ...fields] of record.events) this[kind](...fields);
    for (const [id, count, isPrefill] of record.scheduled) {
      const one = this.sequences.get(id);
      if (one) this.change(id, {writes: count, isPrefill: !!isPrefill, furthest: Math.max(one.furthest, one.computed + count)});
    }
    this.counts.preemptions += record.preempted?.length ?? 0;
    this.counts.evictions = record.evictions ?? this.counts.evictions;
    for (const name of ["hits", "looked_up", "copies", "swapped_out", "swapped_in"]) this.counts[name] += record[name] ?? 0;
  }

  finishStep() {  // what the last step wrote is stored now, but for rejected drafts
    const rejected = new Map(this.record?.rejected ?? []);
    for (const [id] of this.record?.scheduled ?? []) {
      const one = this.sequences.get(id);
      if (!one) continue;
      const computed = one.computed + one.writes - (rejected.get(id) ?? 0);
      this.change(id, {computed, writes: 0, lost: one.lost && computed < one.furthest});
    }
  }

  // ---- the events ----

  arrive(id, request, prompt) {
    this.sequences.set(id, {id, request, prompt, state: "waiting", table: [], computed: 0, writes: 0, isPrefill: false,
                            furthest: 0, lost: false});
  }
  transition(id, state) {
    const changes = {state, from: this.sequences.get(id)?.state};  // to waiting: it has lost its blocks
    this.change(id, state === "waiting" ? {...changes, computed: 0, lost: true} : changes);
  }
  adopt(id, count) { this.change(id, {computed: count}); }
  fork(id, parent, count) { this.change(id, {computed: count, furthest: count}); }
  publish(block) { this.hashed.add(block); }
  drophash(block) { this.hashed.delete(block); }

  hold(id, first, blocks, hits) {  // the table is `blocks` from entry `first` on; all but `hits` were free before
    for (const block of blocks) if (!hits.includes(block)) this.hashed.delete(block);
    const one = this.sequences.get(id);
    if (one) this.change(id, {table: one.table.slice(0, first).concat(blocks)});
  }

  free(id) {
    this.change(id, {table: []});
    if (this.sequences.get(id)?.state === "finished") this.drop(id);
  }

  end(id, reason) {
    this.change(id, {state: "finished", reason});
    if (!this.sequences.get(id)?.table.length) this.drop(id);
  }

  drop(id) {
    const one = this.sequences.get(id);
    if (!one) return;
    this.sequences.delete(id);
    this.ended.set(id, one);
    if (this.ended.size > 256) this.ended.delete(this.ended.keys().next().value);
  }

  // ---- what can be asked ----

  of(request) {  // its sequences, in order of their samples
    const all = [...this.ended.values(), ...this.sequences.values()];
    return all.filter(one => one.request === request).sort((a, b) => a.id - b.id);
  }

  inState(state) { return [...this.sequences.values()].filter(one => one.state === state); }

  // Block -> its owners, how many of its slots hold a token after this step, and which of them (from, to) it writes.
  held() {
    const found = new Map();
    for (const one of this.sequences.values()) {
      one.table.forEach((block, index) => {
        const inside = count => Math.min(this.blockSize, Math.max(0, count - index * this.blockSize));
        const from = inside(one.computed), to = inside(one.computed + one.writes);
        const cell = found.get(block) ?? {owners: [], tokens: 0, from: 0, to: 0};
        cell.owners.push(one.id);
        cell.tokens = Math.max(cell.tokens, to);
        if (to > from) Object.assign(cell, {from, to});
        found.set(block, cell);
      });
    }
    return found;
  }
}

const isStep = record => record.scheduled.length > 0;

// Records, and the pool after the first `position` of them. Positions count from the first record ever; the oldest
// records are forgotten. Every so many records a copy of the pool is kept, from which earlier moments are rebuilt.
class History {
  static MOST = 4096;
  static EVERY = 128;

  constructor(snapshot) {
    this.first = 0;
    this.records = [];
    this.position = 0;
    this.pool = new Pool(snapshot);
    this.copies = new Map([[0, this.pool.clone()]]);
  }

  get end() { return this.first + this.records.length; }
  record(position) { return this.records[position - this.first]; }

  append(records) {
    for (const record of records) {
      record.numTokens = [0, 0];  // decoded, and of prompts
      for (const [, count, isPrefill] of record.scheduled) record.numTokens[isPrefill] += count;
      this.records.push(record);
    }
    while (this.records.length > History.MOST + History.EVERY) {
      const first = this.first + History.EVERY;
      if (this.position < first) this.seek(first);
      if (!this.copies.has(first)) this.copies.set(first, this.rebuilt(first));
      this.copies.delete(this.first);
      this.records.splice(0, History.EVERY);
      this.first = first;
    }
  }

  rebuilt(position) {
    let from = position - (position - this.first) % History.EVERY;
    while (!this.copies.has(from)) from -= History.EVERY;
    const pool = this.copies.get(from).clone();
    for (let at = from; at < position; at++) pool.apply(this.record(at));
    return pool;
  }

  seek(position) {
    position = Math.max(this.first, Math.min(this.end, position));
    if (position < this.position) {
      [this.pool, this.position] = [this.rebuilt(position), position];
    }
    while (this.position < position) {
      this.pool.apply(this.record(this.position++));
      if ((this.position - this.first) % History.EVERY === 0 && !this.copies.has(this.position)) {
        this.copies.set(this.position, this.pool.clone());
      }
    }
  }

  // One step on: past records between steps, too, and past those after the last step. False at the end.
  forward() {
    let to = this.position;
    while (to < this.end && !isStep(this.record(to))) to++;
    if (to < this.end) to++;
    if (!this.records.slice(to - this.first).some(isStep)) to = this.end;
    const moved = to > this.position;
    this.seek(to);
    return moved;
  }

  back() {
    let to = this.position;
    while (to > this.first && !isStep(this.record(to - 1))) to--;  // now after the last step
    if (to === this.position || to === this.first) to--;
    while (to > this.first && !isStep(this.record(to - 1))) to--;
    this.seek(to);
  }
}
