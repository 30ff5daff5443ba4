// Tokens: how they look, and what they say when pointed at or focused.

const tip = document.getElementById("tip");
const BREAK = "\u21b5";
const PART = "\u25af";

function tokenNode(guide, response, k) {
  const i = response.first + k;
  const x = logratio(guide, i);
  const weight = weightOf(guide, response, i);
  const node = element("span", { class: "token", tabindex: k ? -1 : 0 }, visibleText(response.texts[k]));
  node.classList.add(x < 0 ? "minus" : "plus", weight < 1 ? "less" : "more");
  node.classList.toggle("negative", weight < 0);
  node.style.setProperty("--strength", Math.min(Math.abs(x) / fullColour, 1).toFixed(3));
  node.dataset.token = k;
  return node;
}

// What would be invisible gets a sign; the rest of the text is shown as it is.
function visibleText(text) {
  return text === "" ? PART : text.replace(/\r\n|[\r\n]/g, BREAK);
}

function tokenFacts(guide, response, k) {
  const i = response.first + k;
  const text = response.texts[k];
  const several = guides.length > 1;
  const rewards = together(guides.map((one) => settings.guideBeta * logratio(one, i)), 4, signed);
  // Beside the 1 that a weight has without guidance.
  const [, ...weights] = together([1, ...guides.map((one) => weightOf(one, response, i))], 4);
  const models = ["reference", ...(logps.policy ? ["policy"] : []), ...guides.map((one) => one.name)];
  const values = together(models.map((model) => logps[model][i]), 4);
  const of = Object.fromEntries(models.map((model, m) => [model, values[m]]));
  const facts = [
    ["token", text === "" ? "part of the next character" : JSON.stringify(text)],
    ["position", `${k + 1} of ${response.texts.length}, ${response.name}`],
    ...guides.flatMap((one, g) => [
      [several ? `reward, ${one.name}` : "reward", rewards[g]],
      [several ? `weight, ${one.name}` : "weight", weights[g]],
    ]),
    ...guides.map((one) => [`log \u03c0 ${one.name}`, of[one.name]]),
    ["log \u03c0 reference", of.reference],
  ];
  if (logps.policy) {
    const adds = settings.beta * weightOf(guide, response, i) * (logps.policy[i] - logps.reference[i]);
    facts.push(["log \u03c0 policy", of.policy]);
    facts.push([several ? `adds to score, ${guide.name}` : "adds to score", signed(adds, decimalsOf([adds], 4))]);
  }
  return facts;
}

function showTip(node) {
  const { guide, response } = node.closest(".text");
  tip.replaceChildren(
    ...tokenFacts(guide, response, Number(node.dataset.token)).map(([name, value]) =>
      element("div", {}, element("span", {}, name), element("b", {}, value)),
    ),
  );
  tip.hidden = false;
  node.setAttribute("aria-describedby", "tip");
  const box = node.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? above : below}px`;
}

function hideTip() {
  tip.hidden = true;
  for (const node of document.querySelectorAll("[aria-describedby=tip]")) node.removeAttribute("aria-describedby");
}

// One tab stop a response; arrows, Home and End move within it.
function moveFocus(event) {
  const node = event.target.closest(".token");
  if (!node) return;
  const tokens = [...node.closest(".text").querySelectorAll(".token")];
  const here = Number(node.dataset.token);
  const target = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (target === undefined || !tokens[target]) return;
  event.preventDefault();
  node.tabIndex = -1;
  tokens[target].tabIndex = 0;
  tokens[target].focus();
}

function listenToTokens(main) {
  main.addEventListener("mouseover", (event) => {
    const node = event.target.closest(".token");
    if (node) showTip(node);
    else hideTip();
  });
  main.addEventListener("mouseleave", hideTip);
  main.addEventListener("focusin", (event) => event.target.matches(".token") && showTip(event.target));
  main.addEventListener("focusout", hideTip);
  main.addEventListener("keydown", moveFocus);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  // Focus may have scrolled its token into view: then the tip goes along.
  document.addEventListener("scroll", () => (document.activeElement.matches(".token") ? showTip(document.activeElement) : hideTip()), {
    passive: true,
  });
}
