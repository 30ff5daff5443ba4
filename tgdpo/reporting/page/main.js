// The page's frame: summary, legend, controls, theme.

const byId = (id) => document.getElementById(id);
const THEMES = { system: "light dark", light: "light", dark: "dark" };

function tile(title, value, note) {
  return element("div", { class: "tile" }, element("h2", {}, title), element("strong", {}, value), element("p", {}, note));
}

function drawTiles(target) {
  target.replaceChildren(...guides.map(guideNode));
}

function guideNode(guide) {
  const { alpha, guideBeta: beta } = settings;
  const count = pairs.reduce((sum, pair) => sum + negativeWeights(guide, pair), 0);
  const tokens = guide.logps.length;
  const toward = guide.toward.map((value) => alpha * beta * value);
  const [, mean, deviation, least, most] = together([1, 1 + toward[0], toward[1], 1 + toward[2], 1 + toward[3]], 3);
  const [accuracy, low, high] = percents([guide.accuracy, ...guide.interval]);
  const ties = guide.ties ? `, ${guide.ties} ${guide.ties > 1 ? "ties" : "tie"}` : "";
  const name = element("h2", { class: "model" }, `${guide.name} `, element("span", {}, guide.model));
  return element(
    "section",
    { class: "guide", "aria-label": guide.name },
    ...(guides.length > 1 ? [name] : []),
    element(
      "div",
      { class: "tiles" },
      tile("Guide accuracy", accuracy, `${guide.correct} of ${pairs.length} pairs${ties}; 95 % interval ${low} to ${high}`),
      tile("Guide margin", signed(beta * guide.margin), "chosen less rejected, summed token rewards, mean over pairs"),
      ...(guide.weights ? [selectedTile(guide)] : [
        tile("Negative weights", percent(count / tokens, 2), `${count.toLocaleString("en-US")} of ${tokens.toLocaleString("en-US")} tokens are pushed the other way`),
        tile("Token weights", mean, `mean; deviation ${deviation}, from ${least} to ${most}`),
        alphaTile(guide),
      ]),
    ),
  );
}

function selectedTile(guide) {
  const count = guide.weights.reduce((sum, weight) => sum + weight, 0);
  const [selected, tokens] = [count, guide.weights.length].map((number) => number.toLocaleString("en-US"));
  return tile("Selected tokens", percent(count / guide.weights.length), `${selected} of ${tokens} tokens count, the others do not`);
}

// Up to which alpha at most so many tokens have negative weights.
function alphaTile(guide) {
  const limits = guide.tails.map(([, tail]) => (tail < 0 ? -1 / (settings.guideBeta * tail) : Infinity));
  const [alpha, ...texts] = together([settings.alpha, ...limits], 2);
  const rows = limits.map((limit, k) => {
    const [share] = guide.tails[k];
    const row = element(
      "tr",
      {},
      element("td", {}, share ? `at most ${percent(share, 0)}` : "none"),
      element("td", {}, Number.isFinite(limit) ? texts[k] : "any"),
      element("td", {}, settings.alpha <= limit ? "\u2713" : "\u2717 exceeded"),
    );
    row.classList.toggle("exceeded", settings.alpha > limit);
    return row;
  });
  const head = element("tr", {}, element("th", {}, "tokens negative"), element("th", {}, "alpha up to"), element("th", {}, `alpha ${alpha}`));
  return element("div", { class: "tile wide" }, element("h2", {}, "Effective alpha range"), element("table", {}, head, ...rows));
}

function drawLegend(target) {
  const sample = (classes, strength, text) => {
    const node = element("span", { class: `token ${classes}` }, text);
    node.style.setProperty("--strength", strength);
    return node;
  };
  const full = settings.guideBeta * fullColour;
  const [least, less, none, more, most] = together([-full, -full / 2, 0, full / 2, full], 0, signed);
  target.replaceChildren(
    element("span", {}, "reward ", sample("minus", 1, least), sample("minus", 0.5, less), sample("", 0, none), sample("plus", 0.5, more), sample("plus", 1, most),
      " (striped: negative)"),
    element("span", {}, "weight ", sample("more", 0.8, "above 1"), " ", sample("less", 0.8, "below 1"), " ", sample("less negative", 0.8, "negative")),
    element("span", {}, `${PART} part of the next character, ${BREAK} line end`),
  );
}

// Choices that only several guides give.
function offerGuides() {
  byId("guide").append(...guides.map((guide, g) => element("option", { value: g }, guide.name)));
  for (const node of document.querySelectorAll(".several")) node.hidden = guides.length < 2;
  byId("alpha").parentElement.hidden = guides.some((guide) => guide.weights);
}

function start() {
  offerGuides();
  const list = makePairList(byId("pairs"));
  const arrange = () => {
    const shown = list.arrange(byId("sort").value, byId("only").checked, byId("search").value);
    byId("count").textContent = `${shown} of ${pairs.length} pairs \u2193`;
  };
  const draw = () => {
    drawTiles(byId("tiles"));
    drawLegend(byId("legend"));
    drawCharts(byId("charts"));
  };
  const change = (name, value) => {
    if (!Number.isFinite(value) || value < 0 || (name === "beta" && value === 0)) return;
    settings[name] = value;
    draw();
    list.refresh();
    if (byId("sort").value === "negative") arrange();
  };
  for (const name of ["alpha", "beta"]) {
    byId(name).value = settings[name];
    byId(name).addEventListener("input", (event) => change(name, event.target.valueAsNumber));
  }
  byId("reset").addEventListener("click", () => {
    for (const name of ["alpha", "beta"]) {
      byId(name).value = report[name];
      change(name, report[name]);
    }
  });
  byId("sort").addEventListener("change", arrange);
  byId("search").addEventListener("input", arrange);
  byId("guide").addEventListener("change", (event) => {
    settings.guide = Number(event.target.value);
    arrange();
  });
  byId("only").addEventListener("change", arrange);
  byId("bar").addEventListener("submit", (event) => event.preventDefault());
  let theme = "system";
  byId("theme").addEventListener("click", (event) => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    document.documentElement.style.colorScheme = THEMES[theme];
    event.target.textContent = `Theme: ${theme}`;
  });
  listenToTokens(byId("pairs"));
  draw();
  arrange();
  let width = byId("charts").clientWidth;
  new ResizeObserver(() => {
    if (byId("charts").clientWidth === width) return;
    width = byId("charts").clientWidth;
    drawCharts(byId("charts"));
  }).observe(byId("charts"));
}

start();
