"use strict";
// Everything follows from x = log pi_g - log pi_ref of a token (nats): its reward is beta x, its weight
// 1 + alpha beta x on chosen and 1 - alpha beta x on rejected responses, where beta is the guide's, if it has its own.

const RESPONSES = ["chosen", "rejected"];
const report = JSON.parse(document.getElementById("data").textContent);
const settings = {
  alpha: report.alpha,
  beta: report.beta,
  guide: 0,
  get guideBeta() {
    return report.guide_beta ?? this.beta;
  },
};

const logps = Object.fromEntries(Object.entries(report.logps).map(([model, text]) => [model, decodeFloats(text)]));
// Each guide has its name, its model's, its metrics, and logps; weights where alpha and beta do not make them.
const guides = report.guides.map((guide) => ({ ...guide, logps: logps[guide.name], weights: guide.weights && decodeFloats(guide.weights) }));
const pairs = readPairs();
// |x| that gets the full colour, the same for all guides.
const fullColour = Math.max(...guides.map((guide) => guide.scale));

function decodeFloats(text) {
  return new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function readPairs() {
  let first = 0;
  return report.pairs.map((pair, order) => {
    const responses = pair.texts.map((texts, index) => {
      const response = { name: RESPONSES[index], sign: index ? -1 : 1, first, texts, sentences: pair.sentences[index] };
      first += texts.length;
      return response;
    });
    const [chosen, rejected] = responses;
    const margins = guides.map((guide) => totalOf(guide, chosen) - totalOf(guide, rejected));
    return { ...pair, order, responses, margins, longer: chosen.texts.length - rejected.texts.length };
  });
}

function logratio(guide, i) {
  return guide.logps[i] - logps.reference[i];
}

// x summed over the tokens [from, to) of a response.
function sumOf(guide, response, from, to) {
  let sum = 0;
  for (let i = response.first + from; i < response.first + to; i++) sum += logratio(guide, i);
  return sum;
}

function totalOf(guide, response) {
  return sumOf(guide, response, 0, response.texts.length);
}

function weightOf(guide, response, i) {
  if (guide.weights) return guide.weights[i];
  return 1 + response.sign * settings.alpha * settings.guideBeta * logratio(guide, i);
}

function weightsOf(guide, response) {
  return response.texts.map((_, k) => weightOf(guide, response, response.first + k));
}

function negativeWeights(guide, pair) {
  let count = 0;
  for (const response of pair.responses)
    for (let i = response.first; i < response.first + response.texts.length; i++) count += weightOf(guide, response, i) < 0;
  return count;
}

// [tokens from, to) of each sentence.
function sentenceRanges(response) {
  return response.sentences.map((from, k) => [from, response.sentences[k + 1] ?? response.texts.length]);
}

// beta * sum of weight * (log pi_theta - log pi_ref): what the loss compares between the two responses.
function scoreOf(guide, response) {
  let sum = 0;
  for (let i = response.first; i < response.first + response.texts.length; i++)
    sum += weightOf(guide, response, i) * (logps.policy[i] - logps.reference[i]);
  return settings.beta * sum;
}

// How many decimals tell values apart that are read side by side: the smallest gap, that to 0 too, shows to a tenth.
// tgdpo/reporting/numbers.py is the same rule.
function decimalsOf(values, least = 0) {
  const distinct = [...new Set([0, ...values.filter(Number.isFinite)])].sort((a, b) => a - b);
  const noise = 1e-9 * Math.max(-distinct[0], distinct.at(-1));
  let gap = Infinity;
  for (let k = 1; k < distinct.length; k++) if (distinct[k] - distinct[k - 1] > noise) gap = Math.min(gap, distinct[k] - distinct[k - 1]);
  let decimals = least;
  while (decimals < 12 && distinct.some((value) => Math.abs(value - Number(value.toFixed(decimals))) > gap / 10)) decimals++;
  return decimals;
}

function plain(value, decimals = decimalsOf([value], 3)) {
  return value.toFixed(decimals).replace("-", "\u2212");
}

function signed(value, decimals = decimalsOf([value], 3)) {
  const text = Math.abs(value).toFixed(decimals);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
}

// Values that are read side by side, as texts.
function together(values, least = 0, form = plain) {
  const decimals = decimalsOf(values, least);
  return values.map((value) => form(value, decimals));
}

function percents(shares, least = 1) {
  return together(shares.map((share) => 100 * share), least).map((text) => `${text} %`);
}

function percent(share, least = 1) {
  return percents([share], least)[0];
}

// An element with attributes and children; text goes in as text, never as markup.
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
