"use strict";
// The browser of the report's samples. Texts are only ever text: nothing here makes markup of a string.
(() => {
  const data = JSON.parse(document.getElementById("samples-data").textContent);
  const form = document.getElementById("samples-filter");
  const list = document.getElementById("samples-list");
  const said = document.getElementById("samples-count");
  const PAGE = 20;
  const GROUPS = { better: "got better", worse: "got worse", right: "still right", wrong: "still wrong", unknown: "not compared" };
  const tags = Object.keys(data.tags);
  const field = (name) => form.elements.namedItem(name);
  const defaults = () => ({ filter: "all", from: data.systems[data.from].name, to: data.systems[data.to].name,
    by: data.measures.length ? data.measures[0].name : "", q: "", page: "1", ...Object.fromEntries(tags.map((tag) => [tag, "all"])) });
  let state = defaults();

  const make = (tag, kind, ...children) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    element.append(...children);
    return element;
  };
  const system = (name) => data.systems.findIndex((each) => each.name === name);
  const measure = () => data.measures.findIndex((each) => each.name === state.by);

  const group = (row) => {
    const by = measure(), from = row.v[by]?.[system(state.from)] ?? null, to = row.v[by]?.[system(state.to)] ?? null;
    if (from === null || to === null) return "unknown";
    if (from !== to) return to > from ? "better" : "worse";
    return to >= data.measures[by].full ? "right" : "wrong";
  };

  const searched = (row) => row.text ??= [row.id, data.statements[row.s], row.q, row.r,
    ...row.a.map((answer) => answer.d.filter((piece) => piece[0] !== "-").map((piece) => piece.slice(1)).join(""))]
    .join("\n").toLowerCase();

  const found = () => {
    const words = state.q.toLowerCase().trim();
    const wanted = tags.filter((tag) => state[tag] !== "all");
    return data.rows.filter((row) => wanted.every((tag) => row.t[tag] === state[tag])
      && (!words || searched(row).includes(words)));
  };

  const dot = (number) => {
    const mark = make("i", "dot");
    mark.style.setProperty("--colour", `var(--${data.systems[number].colour})`);
    return mark;
  };
  const NAMES = { "=": "span", "+": "ins", "-": "del" };
  const text = (answer) => {
    const whole = make("span", "text", ...answer.d.map((piece) => make(NAMES[piece[0]], "", piece.slice(1) || "(empty)")));
    whole.dir = "auto";
    return whole;
  };
  const marks = (row, number) => data.measures.map((each, place) => {
    const value = row.v[place][number];
    if (value === null) return "";
    if (each.name === "exact_match") return value === 1 ? "✓ right" : "✗ wrong";
    return `${each.title.toLowerCase()} ${value}`;
  }).filter(Boolean).join(", ");
  const outcome = (row, number) => {
    const value = row.v[measure()]?.[number] ?? null;
    return value === null ? "" : value >= data.measures[measure()].full ? "right" : "wrong";
  };

  const answer = (row, each) => {
    const item = make("li", outcome(row, each.by[0]));
    const who = make("span", "who");
    each.by.forEach((number, place) => who.append(place ? ", " : "", dot(number), data.systems[number].title));
    item.append(who, text(each));
    const told = [...new Set(each.by.map((number) => marks(row, number)))].filter(Boolean);
    if (each.u) told.push("cut off at the length limit");
    if (each.n) told.push(`${each.n.toLocaleString("en")} characters, of which the first are shown`);
    item.append(make("span", "mark", told.join("; ")));
    if (each.c) {
      const passages = make("details", "passages", make("summary", "", `read ${each.m} ${each.m === 1 ? "passage" : "passages"}`));
      each.c.forEach((passage) => passages.append(make("p", "", passage)));
      if (each.m > each.c.length) passages.append(make("p", "", `and ${each.m - each.c.length} more`));
      item.append(passages);
    }
    return item;
  };

  const sample = (row) => {
    const is = group(row);
    const article = make("article", "sample", make("header", "",
      make("span", `group ${is}`, GROUPS[is]), make("span", "tags", Object.values(row.t).join(", ")), make("span", "id", row.id)));
    const question = make("div", "question");
    const parts = [["p", "statement", data.statements[row.s]], ["p", "asked", row.q], ["p", "reference", row.r]];
    for (const [tag, kind, content] of parts) {
      if (!content && kind !== "reference") continue;
      const body = make("bdi", "", content || "(none)");
      question.append(kind === "reference" ? make(tag, kind, make("span", "", "reference"), " ", body) : make(tag, kind, body));
    }
    const answers = make("ol", "answers", ...row.a.map((each) => answer(row, each)));
    article.append(question, answers);
    return article;
  };

  const show = () => {
    const rows = found();
    const counts = Object.fromEntries(Object.keys(GROUPS).map((name) => [name, 0]));
    rows.forEach((row) => { counts[group(row)] += 1; });
    for (const option of field("filter").options) {
      const count = option.value === "all" ? rows.length : counts[option.value];
      option.textContent = `${option.value === "all" ? "all" : GROUPS[option.value]} (${count.toLocaleString("en")})`;
    }
    const kept = state.filter === "all" ? rows : rows.filter((row) => group(row) === state.filter);
    const pages = Math.max(1, Math.ceil(kept.length / PAGE));
    const page = Math.min(Math.max(1, parseInt(state.page, 10) || 1), pages);
    state.page = String(page);
    list.replaceChildren(...kept.slice((page - 1) * PAGE, page * PAGE).map(sample));
    const of = data.total > data.rows.length ? ` of the ${data.rows.length.toLocaleString("en")} on this page` : "";
    said.textContent = `${kept.length.toLocaleString("en")} questions${of}, page ${page} of ${pages}`;
    document.querySelectorAll("[data-step]").forEach((button) => {
      button.disabled = button.dataset.step === "1" ? page >= pages : page <= 1;
    });
    for (const name of Object.keys(state)) if (field(name)) field(name).value = state[name];
  };

  const remember = () => {
    const start = defaults();
    const told = Object.entries(state).filter(([name, value]) => value !== start[name]);
    history.replaceState(null, "", `#${told.length ? new URLSearchParams(told) : "samples"}`);
  };
  const recall = () => {
    if (!location.hash.includes("=")) return false;
    const start = defaults();
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(start)) if (given.has(name)) start[name] = given.get(name);
    if (system(start.from) < 0 || system(start.to) < 0) [start.from, start.to] = [defaults().from, defaults().to];
    if (!(start.filter in GROUPS)) start.filter = "all";
    if (!data.measures.some((each) => each.name === start.by)) start.by = defaults().by;
    state = start;
    return true;
  };

  let waiting = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state[event.target.name] = event.target.value;
      state.page = "1";
      show();
      remember();
    }, event.target.name === "q" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => {
    state.page = String(Number(state.page) + Number(button.dataset.step));
    show();
    remember();
    list.focus({ preventScroll: true });
    document.getElementById("samples").scrollIntoView();
  }));
  addEventListener("hashchange", () => { if (recall()) show(); });

  document.querySelectorAll("[data-script]").forEach((part) => { part.hidden = part.dataset.script !== "on"; });
  const asked = recall();
  show();
  if (asked) document.getElementById("samples").scrollIntoView();
})();
