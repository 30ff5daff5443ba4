// Pairs: a heading each, and a body that exists only while it is near the screen.

const LINE_PIXELS = 27;
const CHARACTERS_A_LINE = 75;
const sentenceScale = fullBar();

// The sentence sum (in x) that gets a whole bar: all but the largest twentieth fit.
function fullBar() {
  const sums = pairs.flatMap((pair) =>
    pair.responses.flatMap((response) => sentenceRanges(response).map(([from, to]) => Math.abs(sumOf(response, from, to)))),
  );
  sums.sort((a, b) => a - b);
  return sums[Math.floor(0.95 * (sums.length - 1))] || 1;
}

function pairNode(pair) {
  const node = element(
    "article",
    { class: "pair", "aria-label": `pair ${pair.index}` },
    element("h2", {}, element("span", { class: "number" }, `Pair ${pair.index}`), element("span", { class: "source" }, pair.source)),
    element("p", { class: "verdict" }),
    element("div", { class: "body" }),
  );
  node.pair = pair;
  node.querySelector(".body").style.minHeight = `${estimatedHeight(pair)}px`;
  headPair(node);
  return node;
}

function headPair(node) {
  const { pair } = node;
  const agrees = pair.margin > 0;
  node.classList.toggle("against", !agrees);
  const negative = negativeWeightsOfPair(pair);
  node.querySelector(".verdict").replaceChildren(
    element("b", {}, agrees ? "\u2713 guide agrees" : "\u2717 guide disagrees"),
    ` with the label: margin ${signed(settings.beta * pair.margin)}`,
    ` \u00b7 ${negative} negative ${negative === 1 ? "weight" : "weights"}`,
    ...(logps.policy ? [` \u00b7 policy's loss ${lossOf(pair).toFixed(3)}`] : []),
  );
}

function lossOf(pair) {
  const margin = scoreOf(pair.responses[0]) - scoreOf(pair.responses[1]);
  return Math.max(-margin, 0) + Math.log1p(Math.exp(-Math.abs(margin)));
}

function estimatedHeight(pair) {
  const lines = pair.responses.map((response) => {
    const characters = response.texts.reduce((sum, text) => sum + text.length, 0);
    return characters / CHARACTERS_A_LINE + 0.6 * response.sentences.length;
  });
  return Math.round(LINE_PIXELS * Math.max(...lines)) + 110;
}

function fillBody(node) {
  const prompt = element("details", { class: "prompt" }, element("summary", {}, "Prompt"), element("pre", { dir: "auto" }, node.pair.prompt));
  if (node.pair.prompt.length < 600) prompt.open = true;
  const responses = element("div", { class: "responses" }, ...node.pair.responses.map(responseNode));
  node.querySelector(".body").replaceChildren(prompt, responses);
}

function emptyBody(node) {
  const body = node.querySelector(".body");
  if (body.contains(document.activeElement)) return;
  body.style.minHeight = `${body.offsetHeight}px`;
  body.replaceChildren();
}

function responseNode(response) {
  const tokens = response.texts.length;
  const total = settings.beta * sumOf(response, 0, tokens);
  let weights = 0;
  for (let i = response.first; i < response.first + tokens; i++) weights += weightOf(response, i);
  const facts = [`${tokens} tokens`, `reward ${signed(total)}`, `mean weight ${plain(weights / tokens)}`];
  if (logps.policy) facts.push(`score ${signed(scoreOf(response))}`);
  const text = element(
    "div",
    { class: "text", role: "group", "aria-label": `${response.name} response; arrow keys move from token to token` },
    ...sentenceRanges(response).map(([from, to]) => sentenceNode(response, from, to)),
  );
  text.response = response;
  return element(
    "section",
    { class: `response ${response.name}` },
    element("h3", {}, response.name, element("span", {}, facts.join(" \u00b7 "))),
    text,
  );
}

function sentenceNode(response, from, to) {
  const sum = sumOf(response, from, to);
  const bar = element("i", { class: sum < 0 ? "minus" : "plus" });
  bar.style.setProperty("--length", Math.min(Math.abs(sum) / sentenceScale, 1).toFixed(3));
  const words = element("div", { class: "words", dir: "auto" });
  for (let k = from; k < to; k++) words.append(tokenNode(response, k));
  return element("div", { class: "sentence" }, element("div", { class: "sum" }, signed(settings.beta * sum, 2), bar), words);
}

const ORDERS = {
  disagreement: (a, b) => a.margin - b.margin,
  agreement: (a, b) => b.margin - a.margin,
  negative: (a, b) => negativeWeightsOfPair(b) - negativeWeightsOfPair(a),
  dataset: (a, b) => a.order - b.order,
};

function makePairList(main) {
  const nodes = pairs.map(pairNode);
  const watcher = new IntersectionObserver(
    (entries) => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? fillBody : emptyBody)(target)),
    { rootMargin: "700px 0px" },
  );
  nodes.forEach((node) => watcher.observe(node));
  return {
    arrange(order, only) {
      nodes.sort((a, b) => ORDERS[order](a.pair, b.pair) || a.pair.order - b.pair.order);
      nodes.forEach((node) => (node.hidden = only && node.pair.margin > 0));
      main.replaceChildren(...nodes);
      return nodes.filter((node) => !node.hidden).length;
    },
    refresh() {
      nodes.forEach(headPair);
      nodes.filter((node) => node.querySelector(".responses")).forEach(fillBody);
    },
  };
}
