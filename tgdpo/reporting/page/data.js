"use strict";
// Everything follows from x = log pi_g - log pi_ref of a token (nats): its reward is beta x, its weight
// 1 + alpha beta x on chosen and 1 - alpha beta x on rejected responses.

const RESPONSES = ["chosen", "rejected"];
const report = JSON.parse(document.getElementById("data").textContent);
const metrics = report.metrics;
const settings = { alpha: report.alpha, beta: report.beta };

const logps = Object.fromEntries(Object.entries(report.logps).map(([model, text]) => [model, decodeFloats(text)]));
const pairs = readPairs();

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
    const [chosen, rejected] = responses.map((response) => sumOf(response, 0, response.texts.length));
    return { ...pair, order, responses, margin: chosen - rejected };
  });
}

function logratio(i) {
  return logps.guide[i] - logps.reference[i];
}

// x summed over the tokens [from, to) of a response.
function sumOf(response, from, to) {
  let sum = 0;
  for (let i = response.first + from; i < response.first + to; i++) sum += logratio(i);
  return sum;
}

function weightOf(response, i) {
  return 1 + response.sign * settings.alpha * settings.beta * logratio(i);
}

function negativeWeights(response) {
  let count = 0;
  for (let i = response.first; i < response.first + response.texts.length; i++) count += weightOf(response, i) < 0;
  return count;
}

function negativeWeightsOfPair(pair) {
  return negativeWeights(pair.responses[0]) + negativeWeights(pair.responses[1]);
}

// [tokens from, to) of each sentence.
function sentenceRanges(response) {
  return response.sentences.map((from, k) => [from, response.sentences[k + 1] ?? response.texts.length]);
}

// beta * sum of weight * (log pi_theta - log pi_ref): what the loss compares between the two responses.
function scoreOf(response) {
  let sum = 0;
  for (let i = response.first; i < response.first + response.texts.length; i++)
    sum += weightOf(response, i) * (logps.policy[i] - logps.reference[i]);
  return settings.beta * sum;
}

function signed(value, digits = 3) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
}

function plain(value, digits = 3) {
  return value.toFixed(digits).replace("-", "\u2212");
}

function percent(share, digits = 1) {
  return (100 * share).toFixed(digits) + " %";
}

// An element with attributes and children; text goes in as text, never as markup.
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
