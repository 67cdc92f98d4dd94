"use strict";
// Stories: those that this page has asked the server for, and those of a recording. Each shows as much of its text as
// the moment that is shown had computed.

const MOST_STORIES = 24;
const ELSEWHERE_MS = 1000;
let numStories = 0;

class Story {
  constructor(name, prompt, sample) {
    this.sample = sample;   // its place among the sequences of its request
    this.request = null;    // the request's label in the events
    this.pieces = [];       // [tokens until then, text]
    this.numTokens = 0;
    this.result = null;     // how it ended, once the server has said so
    this.isSeen = false;    // whether a sequence of its own was among those shown
    this.firstMs = null;    // when its first piece came
    this.card = document.createElement("article");
    this.card.innerHTML = '<div class="about"><span class="name"></span><span class="state quiet">sent</span></div>' +
                          '<p><b></b><span class="text"></span></p>';
    this.card.querySelector(".name").textContent = name;
    this.card.querySelector("b").textContent = prompt;
  }

  part(selector) { return this.card.querySelector(selector); }

  add(text, numTokens) {
    this.firstMs ??= performance.now();
    this.numTokens += numTokens;
    this.pieces.push([this.numTokens, text]);
  }

  // `isAll`: what the server has sent, however far the shown moment is. `isAtEnd`: nothing is left to play. A story that
  // has not been seen then is one of another engine (replica), and is shown as it comes.
  show(pool, isAll, isAtEnd) {
    const one = pool.of(this.request)[this.sample];
    this.isSeen ||= one !== undefined;
    isAll ||= isAtEnd && !this.isSeen && this.firstMs !== null && performance.now() - this.firstMs > ELSEWHERE_MS;
    const isOver = this.isSeen && (!one || pool.ended.has(one.id)), shown = one ? one.furthest - one.prompt + 1 : 0;
    const pieces = isOver || isAll ? this.pieces : this.pieces.filter(([count]) => count <= shown);
    const text = pieces.map(piece => piece[1]).join("");
    if (this.part(".text").textContent !== text) this.part(".text").textContent = text;
    if (one) this.card.style.borderLeftColor = colour(one.id);
    if (this.result?.isBad) return;
    this.part(".state").textContent = isOver || (isAll && this.result)
      ? this.result?.text ?? `ended (${one?.reason ?? "its answer is on its way"})`
      : one ? this.doing(one) : "sent";
  }

  doing(one) {
    const stored = `${number(one.computed + one.writes)} tokens stored`;
    if (one.state === "swapped") return `S${one.id}, in swap space: ${stored}`;
    if (one.state === "waiting") return `S${one.id}, ${one.furthest ? "preempted: waits again" : "waits"}`;
    return `S${one.id}, ${one.isPrefill ? "prefill" : "decode"}: ${stored}`;
  }

  end(text, isBad) {
    if (this.result) return;
    this.result = {text, isBad};
    this.part("button")?.remove();
    if (isBad) this.part(".state").textContent = text;
    this.part(".state").classList.toggle("alarm", isBad);
    $("announced").textContent = `${this.part(".name").textContent}: ${text}`;
  }
}

// The server-sent events of a response. EventSource cannot send a key or a body.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ;) {
      const {value, done} = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const found = {kind: "message", data: ""};
        for (const line of part.split("\n")) {
          if (line.startsWith("data: ")) found.data += line.slice(6);
          if (line.startsWith("event: ")) found.kind = line.slice(7);
        }
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // cancel() rejects if the request was aborted
  }
}

const headers = () => $("key").value ? {Authorization: `Bearer ${$("key").value}`} : {};
const errorMessage = response =>
  response.json().then(body => body.error.message).catch(() => `status ${response.status}`);

// Several stories are one request with several prompts: a browser opens at most six connections to a server.
function generate({prompt, times, n, maxTokens, temperature}, onGrown) {
  const abort = new AbortController(), began = performance.now(), count = times * n;
  const stop = count > 1 ? `Stop these ${count}` : "Stop";
  const started = Array.from({length: count}, (_, i) => {
    const story = new Story(`Story ${++numStories}`, prompt, i % n), button = document.createElement("button");
    Object.assign(button, {type: "button", className: "small", textContent: stop, onclick: () => abort.abort()});
    story.part(".about").append(button);
    return story;
  });
  const work = async () => {
    const response = await fetch("v1/completions", {
      method: "POST", signal: abort.signal, headers: {"Content-Type": "application/json", ...headers()},
      body: JSON.stringify({prompt: Array(times).fill(prompt), n, max_tokens: maxTokens, temperature, stream: true, return_token_ids: true}),
    });
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const {data} of events(response)) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      const label = piece.id.slice(0, piece.id.lastIndexOf("-"));  // what events have: the first part of the id
      started.forEach((story, index) => { story.request ??= `${label}-${Math.floor(index / n)}`; });
      for (const {index, text, token_ids, finish_reason} of piece.choices) {
        const story = started[index];
        story.add(text, token_ids?.length ?? 0);
        onGrown();
        if (finish_reason) story.end(`ended after ${((performance.now() - began) / 1000).toFixed(1)} s on the server (${finish_reason})`, false);
      }
    }
    for (const story of started) story.end("the stream ended early", true);
  };
  work().catch(error => {
    for (const story of started) story.end(abort.signal.aborted ? "stopped" : error.message, true);
  }).finally(() => { onGrown(); setTimeout(onGrown, 1.1 * ELSEWHERE_MS); });
  return started;
}
