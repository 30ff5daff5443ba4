// The page's frame: summary, legend, controls, theme.

const byId = (id) => document.getElementById(id);
const THEMES = { system: "light dark", light: "light", dark: "dark" };

function tile(title, value, note) {
  return element("div", { class: "tile" }, element("h2", {}, title), element("strong", {}, value), element("p", {}, note));
}

function drawTiles(target) {
  const { alpha, beta } = settings;
  const count = pairs.reduce((sum, pair) => sum + negativeWeightsOfPair(pair), 0);
  const tokens = logps.guide.length;
  const [mean, deviation, least, most] = metrics.toward.map((value) => alpha * beta * value);
  const [low, high] = metrics.interval.map((share) => percent(share));
  target.replaceChildren(
    tile("Guide accuracy", percent(metrics.accuracy), `${metrics.correct} of ${pairs.length} pairs; 95 % interval ${low} to ${high}`),
    tile("Guide margin", signed(beta * metrics.margin), "chosen less rejected, summed token rewards, mean over pairs"),
    tile("Negative weights", percent(count / tokens, 2), `${count.toLocaleString("en-US")} of ${tokens.toLocaleString("en-US")} tokens are pushed the other way`),
    tile("Token weights", plain(1 + mean), `mean; deviation ${plain(deviation)}, from ${plain(1 + least)} to ${plain(1 + most)}`),
    alphaTile(),
  );
}

// Up to which alpha at most so many tokens have negative weights.
function alphaTile() {
  const rows = metrics.tails.map(([share, tail]) => {
    const limit = tail < 0 ? -1 / (settings.beta * tail) : Infinity;
    const row = element(
      "tr",
      {},
      element("td", {}, share ? `at most ${Number((100 * share).toPrecision(3))} %` : "none"),
      element("td", {}, Number.isFinite(limit) ? number(limit) : "any"),
      element("td", {}, settings.alpha <= limit ? "\u2713" : "\u2717 exceeded"),
    );
    row.classList.toggle("exceeded", settings.alpha > limit);
    return row;
  });
  const head = element("tr", {}, element("th", {}, "tokens negative"), element("th", {}, "alpha up to"), element("th", {}, `alpha ${number(settings.alpha)}`));
  return element("div", { class: "tile wide" }, element("h2", {}, "Effective alpha range"), element("table", {}, head, ...rows));
}

function drawLegend(target) {
  const sample = (classes, strength, text) => {
    const node = element("span", { class: `token ${classes}` }, text);
    node.style.setProperty("--strength", strength);
    return node;
  };
  const full = settings.beta * metrics.scale;
  target.replaceChildren(
    element("span", {}, "reward ", sample("minus", 1, signed(-full, 2)), sample("minus", 0.5, signed(-full / 2, 2)), sample("", 0, "0"),
      sample("plus", 0.5, signed(full / 2, 2)), sample("plus", 1, signed(full, 2)), " (striped: negative)"),
    element("span", {}, "weight ", sample("more", 0.8, "above 1"), " ", sample("less", 0.8, "below 1"), " ", sample("less negative", 0.8, "negative")),
    element("span", {}, `${PART} part of the next character, ${BREAK} line end`),
  );
}

function start() {
  const list = makePairList(byId("pairs"));
  const arrange = () => {
    const shown = list.arrange(byId("sort").value, byId("only").checked);
    byId("count").textContent = `${shown} of ${pairs.length} pairs`;
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
}

start();
