"use strict";
// The page: what is watched, the form, and the connection to the server.

const MOST_CHIPS = 64;
const LIVE = "The engine of this server, step by step.";
const pause = ms => new Promise(done => setTimeout(done, ms));
const isWide = matchMedia("(min-width: 56.01rem)").matches;
const isStill = matchMedia("(prefers-reduced-motion: reduce)");

const map = new PoolMap($("map"), $("strip"), block => { $("block").textContent = map.describe(block); });
const player = new Player(showFrame);
const sources = {live: {history: null, about: LIVE, stories: []}};
let source = "live";

function showFrame(pool, position) {
  map.show(pool, position);
  const held = map.cells.size, shared = [...map.cells.values()].filter(cell => cell.owners.length > 1).length;
  let cached = pool.hashed.size;
  for (const block of map.cells.keys()) cached -= pool.hashed.has(block);
  $("summary").textContent = `${number(held)} of ${number(pool.numBlocks)} blocks of ${pool.blockSize} tokens held, ` +
    `${number(shared)} shared; ${number(cached)} free but cached`;
  $("rows").hidden = !map.isPart;
  $("map").setAttribute("aria-label", `Map of the pool: ${$("summary").textContent}`);
  $("whole-pool").hidden = pool.numBlocks <= WHOLE_UP_TO;
  for (const state of ["running", "waiting", "swapped"]) showQueue(state, pool.inState(state));
  const {counts} = pool;
  $("counts").textContent = `Since the start: ${number(counts.hits)} of ${number(counts.looked_up)} tokens found in the prefix ` +
    `cache, ${number(counts.preemptions)} preemptions, ${number(counts.swapped_out)} blocks swapped out and ` +
    `${number(counts.swapped_in)} in, ${number(counts.copies)} copied on write, ${number(counts.evictions)} evictions.`;
  const isNewest = player.isLive && player.speed === Infinity && player.isPlaying;
  for (const story of sources[source].stories) story.show(pool, isNewest, player.isLive && player.isAtEnd);
  if (map.chosen !== null && $("block").textContent !== map.describe(map.chosen)) $("block").textContent = map.describe(map.chosen);
}

function showQueue(state, sequences) {
  const chips = sequences.slice(0, MOST_CHIPS).map(one => {
    const chip = document.createElement("span");
    chip.className = "chip";
    chip.style.background = mixed(colour(one.id), map.paper ?? "#ffffff", 0.28);
    chip.style.borderColor = colour(one.id);
    chip.textContent = `S${one.id}: ${state === "waiting" ? Math.max(one.prompt, one.furthest) : one.computed + one.writes}`;
    return chip;
  });
  const more = sequences.length - chips.length;
  $(state).replaceChildren(number(sequences.length), ...chips, ...(more > 0 ? [`and ${number(more)} more`] : []));
}

// ---- what is watched ----

const loading = {};  // name -> a promise of the source
let wanted = "live";  // chosen, and perhaps still loading

function press(name) {
  for (const button of document.querySelectorAll("[data-source]")) button.setAttribute("aria-pressed", button.dataset.source === name);
}

async function choose(name) {
  press(wanted = name);
  try {
    sources[name] ??= await (loading[name] ??= load(name));
  } catch (error) {
    delete loading[name];
    if (wanted !== name) return;
    $("about").textContent = `This recording could not be loaded: ${error.message}`;
    return press(wanted = source);
  }
  if (wanted !== name) return;  // another one was chosen meanwhile
  source = name;
  const {history, about, stories} = sources[name];
  $("about").textContent = about;
  $("none").hidden = stories.length > 0;
  for (const box of $("stories").children) box.hidden = box.dataset.of !== name;
  map.reset();
  [map.chosen, $("block").textContent] = [null, "Point at a block, or go to the map and use the arrow keys."];
  if (!history) return;
  history.seek(name === "live" ? history.end : history.first);
  player.open(history, name === "live", name === "live" || !isStill.matches);
}

function boxOf(name) {
  const box = document.createElement("div");
  box.dataset.of = name;
  box.hidden = name !== source;
  $("stories").append(box);
  return box;
}

async function load(name) {
  const response = await fetch(`recordings/${name}.json`, {headers: headers()});
  if (!response.ok) throw new Error(await errorMessage(response));
  const {about, snapshot, records, stories} = await response.json(), history = new History(snapshot), box = boxOf(name);
  history.append(records);
  const shown = stories.map(({name, request, sample, prompt, pieces}) => {
    const story = new Story(name, prompt, sample);
    [story.request, story.pieces] = [request, pieces];
    box.append(story.card);
    return story;
  });
  return {history, about: `A recording, not this server: ${about}`, stories: shown};
}

$("legend").open = isWide;
for (const button of document.querySelectorAll("[data-source]")) button.onclick = () => choose(button.dataset.source);
$("whole").onchange = () => { map.isWhole = $("whole").checked; map.columns = 0; player.frame(); };
matchMedia("(prefers-color-scheme: dark)").onchange = () => { if (player.history) player.frame(); };

// ---- the form ----

const liveBox = boxOf("live");
let isDue = false;

function refresh() {  // a story has grown
  if (isDue || !player.history) return;
  isDue = true;
  requestAnimationFrame(() => { isDue = false; player.frame(); });
}

async function start(times) {
  if (!$("form").reportValidity()) return;
  const value = id => $(id).valueAsNumber;
  const settings = {prompt: $("prompt").value, times, n: value("n"), maxTokens: value("max_tokens"), temperature: value("temperature")};
  if (source !== "live") await choose("live");
  else if (player.history) player.play(true);
  const {stories} = sources.live;
  const started = generate(settings, refresh);
  stories.unshift(...started);
  liveBox.prepend(...started.map(story => story.card));
  $("none").hidden = true;
  for (const old of stories.splice(Math.max(MOST_STORIES, stories.findLastIndex(story => !story.result) + 1))) old.card.remove();
}

$("form").onsubmit = event => { event.preventDefault(); start(1); };
$("prompt").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); start(1); } };
$("start8").onclick = () => start(8);
$("stop").onclick = () => { for (const {card} of sources.live.stories) card.querySelector("button")?.click(); };
$("form").addEventListener("invalid", () => { $("form").querySelector("details").open = true; }, true);

// ---- the connection ----

function connection(text, isBad) {
  $("connection").textContent = text;
  $("connection").classList.toggle("alarm", isBad);
}

async function follow() {
  const key = $("key").value;
  const response = await fetch(`events${location.search}`, {headers: headers()});  // /?replica=1: of another engine
  if (response.status === 401) {
    connection("the server requires an API key", true);
    $("form").querySelector("details").open = true;
    while ($("key").value === key) await pause(200);
    return;
  }
  if (!response.ok) throw new Error(await errorMessage(response));
  connection("connected", false);
  const models = await (await fetch("v1/models", {headers: headers()})).json();
  $("model").textContent = `serves ${models.data[0].id}, up to ${number(models.data[0].max_model_len)} tokens`;
  for await (const {kind, data} of events(response)) {
    if (kind === "closing") throw new Error("the server is shutting down");
    const {snapshot, records} = JSON.parse(data), {live} = sources;
    if (snapshot) {
      live.history = new History(snapshot);
      if (source === "live") { map.reset(); player.open(live.history, true, player.isPlaying); }
    } else {
      live.history.append(records);
      if (source === "live") player.appended();
    }
  }
  throw new Error("the connection has ended");
}

(async () => {
  for (;;) try { await follow(); } catch (error) { connection(`${error.message}; reconnecting`, true); await pause(2000); }
})();
