// Pairs: a heading each, and a body that exists only while it is near the screen.

const LINE_PIXELS = 27;
const CHARACTERS_A_LINE = 75;
const sentenceScale = fullBar();

// The sentence sum (in x) that gets a whole bar: all but the largest twentieth fit.
function fullBar() {
  const sums = guides.flatMap((guide) =>
    pairs.flatMap((pair) =>
      pair.responses.flatMap((response) => sentenceRanges(response).map(([from, to]) => Math.abs(sumOf(guide, response, from, to)))),
    ),
  );
  sums.sort((a, b) => a - b);
  return sums[Math.floor(0.95 * (sums.length - 1))] || 1;
}

// A pair is called by its record in the data, as in error messages.
function pairNode(pair) {
  const cut = pair.source.lastIndexOf("/") + 1;
  const node = element(
    "article",
    { class: "pair", "aria-label": `pair ${pair.source}` },
    element("h2", {}, pair.source.slice(cut), " ", element("span", { class: "source" }, pair.source.slice(0, cut))),
    element("div", { class: "verdicts" }),
    element("div", { class: "body" }),
  );
  node.pair = pair;
  node.querySelector(".body").style.minHeight = `${estimatedHeight(pair)}px`;
  headPair(node);
  return node;
}

function headPair(node) {
  const { pair } = node;
  node.querySelector(".verdicts").replaceChildren(...guides.map((guide, g) => verdictNode(guide, pair, pair.margins[g])));
}

function verdictNode(guide, pair, margin) {
  const sides = { plus: "\u2713 agrees with the label", minus: "\u2717 disagrees with the label", tie: "= has no preference" };
  const negative = negativeWeights(guide, pair);
  const [text] = marginAndRewards(guide, pair);
  const loss = logps.policy && report.plain_loss ? ` \u00b7 policy's loss ${plain(lossOf(guide, pair))}` : "";
  return element(
    "p",
    { class: `verdict ${sideOf(margin)}` },
    element("b", {}, `${guide.name} ${sides[sideOf(margin)]}`),
    ` \u00b7 margin ${text}${guide.weights ? "" : ` \u00b7 ${negative} negative ${negative === 1 ? "weight" : "weights"}`}${loss}`,
  );
}

// Texts of the margin and of the two responses' rewards, whose difference it is.
function marginAndRewards(guide, pair) {
  const [chosen, rejected] = pair.responses.map((response) => settings.guideBeta * totalOf(guide, response));
  return together([chosen - rejected, chosen, rejected], 3, signed);
}

function lossOf(guide, pair) {
  const margin = scoreOf(guide, pair.responses[0]) - scoreOf(guide, pair.responses[1]);
  return Math.max(-margin, 0) + Math.log1p(Math.exp(-Math.abs(margin)));
}

function estimatedHeight(pair) {
  const lines = pair.responses.map((response) => {
    const characters = response.texts.reduce((sum, text) => sum + text.length, 0);
    return characters / CHARACTERS_A_LINE + 0.6 * response.sentences.length;
  });
  return Math.round(guides.length * LINE_PIXELS * Math.max(...lines)) + 110;
}

function fillBody(node) {
  const { pair } = node;
  const prompt = element("details", { class: "prompt" }, element("summary", {}, "Prompt"), element("pre", { dir: "auto" }, pair.prompt));
  if (pair.prompt.length < 600) prompt.open = true;
  node.querySelector(".body").replaceChildren(prompt, ...guides.map((guide) => responsesNode(guide, pair)));
}

function emptyBody(node) {
  const body = node.querySelector(".body");
  if (body.contains(document.activeElement)) return;
  body.style.minHeight = `${body.offsetHeight}px`;
  body.replaceChildren();
}

function responsesNode(guide, pair) {
  const [, ...rewards] = marginAndRewards(guide, pair);
  const means = pair.responses.map((response) => weightsOf(guide, response).reduce((sum, weight) => sum + weight, 0) / response.texts.length);
  const [, ...weights] = together([1, ...means], 3);
  const scores = logps.policy && together(pair.responses.map((response) => scoreOf(guide, response)), 3, signed);
  return element(
    "div",
    { class: "responses" },
    ...pair.responses.map((response, r) => {
      const facts = [`${response.texts.length} tokens`, `reward ${rewards[r]}`, `mean weight ${weights[r]}`];
      if (scores) facts.push(`score ${scores[r]}`);
      return responseNode(guide, response, facts);
    }),
  );
}

function responseNode(guide, response, facts) {
  const ranges = sentenceRanges(response);
  const sums = together(ranges.map(([from, to]) => settings.guideBeta * sumOf(guide, response, from, to)), 2, signed);
  const of = guides.length > 1 ? `, ${guide.name}` : "";
  const text = element(
    "div",
    { class: "text", role: "group", "aria-label": `${response.name} response${of}; arrow keys move from token to token` },
    ...ranges.map(([from, to], k) => sentenceNode(guide, response, from, to, sums[k])),
  );
  text.style.setProperty("--sum", `${Math.max(...sums.map((sum) => sum.length))}ch`);
  text.response = response;
  text.guide = guide;
  return element(
    "section",
    { class: `response ${response.name}` },
    element("h3", {}, response.name + of, element("span", {}, facts.join(" \u00b7 "))),
    text,
  );
}

function sentenceNode(guide, response, from, to, shown) {
  const sum = sumOf(guide, response, from, to);
  const bar = element("i", { class: sum < 0 ? "minus" : "plus" });
  bar.style.setProperty("--length", Math.min(Math.abs(sum) / sentenceScale, 1).toFixed(3));
  const words = element("div", { class: "words", dir: "auto" });
  for (let k = from; k < to; k++) words.append(tokenNode(guide, response, k));
  return element("div", { class: "sentence" }, element("div", { class: "sum" }, shown, bar), words);
}

const marginOf = (pair) => pair.margins[settings.guide];
const differenceOf = (pair) => Math.max(...pair.margins) - Math.min(...pair.margins);
const ORDERS = {
  disagreement: (a, b) => marginOf(a) - marginOf(b),
  agreement: (a, b) => marginOf(b) - marginOf(a),
  negative: (a, b) => negativeWeights(guides[settings.guide], b) - negativeWeights(guides[settings.guide], a),
  difference: (a, b) => differenceOf(b) - differenceOf(a),
  dataset: (a, b) => a.order - b.order,
};

// Whether a pair has a text, in lower case, in what it shows or where it came from.
function mentions(pair, text) {
  pair.searched ??= [pair.source, pair.prompt, ...pair.responses.map((response) => response.texts.join(""))].join("\n").toLowerCase();
  return pair.searched.includes(text);
}

function makePairList(main) {
  const nodes = pairs.map(pairNode);
  const watcher = new IntersectionObserver(
    (entries) => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? fillBody : emptyBody)(target)),
    { rootMargin: "700px 0px" },
  );
  nodes.forEach((node) => watcher.observe(node));
  return {
    arrange(order, only, text) {
      const wanted = text.trim().toLowerCase();
      nodes.sort((a, b) => ORDERS[order](a.pair, b.pair) || a.pair.order - b.pair.order);
      nodes.forEach((node) => (node.hidden = (only && marginOf(node.pair) > 0) || !mentions(node.pair, wanted)));
      main.replaceChildren(...nodes);
      return nodes.filter((node) => !node.hidden).length;
    },
    refresh() {
      nodes.forEach(headPair);
      nodes.filter((node) => node.querySelector(".responses")).forEach(fillBody);
    },
  };
}
