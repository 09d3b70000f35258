// Shows the cases of a large page, some at a time. All that comes from data goes in as text.
(() => {
const root = document.currentScript.closest(".browser");
const data = JSON.parse(document.currentScript.previousElementSibling.textContent);
const list = root.querySelector(".cases");
let chosen = data.cases;
let at = 0;

function make(tag, attributes, ...inside) {
  const it = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) it.setAttribute(name, value);
  it.append(...inside);
  return it;
}

function text(place) { return data.texts[place]; }

function drawn(number, id) { // a picture that stands at the top of the page, by reference
  const [address, width, height] = data.pictures[number];
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  const about = {class: "im", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `image of question ${id}`};
  for (const [name, value] of Object.entries(about)) svg.setAttribute(name, value);
  use.setAttribute("href", address);
  svg.append(use);
  return svg;
}

function picture(number, id) {
  if (number < 0) return make("span", {class: "dim"}, number < -1 ? "(picture left out)" : "(no picture here)");
  const [address, width, height, drawing] = data.pictures[number];
  if (address.startsWith("#")) return drawn(number, id);
  const about = {class: drawing ? "im sharp" : "im", src: address, width, height, alt: `image of question ${id}`};
  return make("img", about);
}

function told([kind, word, said, prob, confidence], prob_name, confidence_name) {
  const answer = said === null ? "" : `“${text(said)}” `;
  let numbers = prob === null ? "" : ` · ${prob_name} ${prob.toFixed(2)}`;
  if (confidence !== null) numbers += ` · ${confidence_name} ${confidence.toFixed(2)}`;
  return [make("b", {class: data.kinds[kind]}, answer + text(word)), make("span", {class: "p"}, numbers)];
}

function shown(item, name, kind) { // an item of a prompt
  const [id, question, answer, number] = data.items[item];
  const given = kind === "query" ? "?" : text(answer);
  const words = make("figcaption", {}, text(question), make("br", {}), "A: ", make("b", {}, given));
  return make("figure", {class: kind}, make("small", {}, name), picture(number, text(id)), words);
}

function other([selector, demos, said]) { // what another selector would have chosen
  const line = make("li", {}, make("span", {class: "who"}, data.selectors[selector]));
  for (const item of demos) {
    const [id, , answer, number] = data.items[item];
    line.append(make("span", {}, ...(number < 0 ? [] : [picture(number, text(id))]), text(answer)));
  }
  if (!demos.length) line.append(make("span", {}, "no demonstration"));
  line.append(make("span", {}, ...told(said, "p", "confidence")));
  return line;
}

function article([query, demos, said, truth, went, others]) {
  const [id, question] = data.items[query];
  const outcomes = went.map((outcome) => data.outcomes[outcome]);
  const tags = outcomes.map((outcome, i) => make("span", {class: "tag"}, `${outcome} against ${data.against[i]}`));
  const prompt = demos.map((item, i) => shown(item, `demonstration ${i + 1}`, "demo"));
  return make("article", {class: ["case", ...outcomes.map((outcome, i) => `${outcome}-${i}`)].join(" ")},
    make(`h${data.level}`, {}, `Question ${text(id)}: ${text(question)}`),
    make("div", {}, ...tags),
    make("div", {class: "strip"}, ...prompt, shown(query, "query", "query")),
    make("p", {}, "The LVLM says ", ...told(said, "probability of the right answer", "its own confidence"),
      make("br", {}), make("span", {class: "dim"}, `truth: ${text(truth)}`)),
    ...(others.length ? [make("ul", {class: "others"}, ...others.map(other))] : []));
}

function turner(words, step) {
  const button = make("button", {type: "button"}, words);
  button.addEventListener("click", () => { at += step; draw(); root.scrollIntoView(); });
  return button;
}

const back = turner("‹ before", -data.at_once);
const on = turner("next ›", data.at_once);
const where = make("span", {class: "where"});

function tell() {
  const last = Math.min(at + data.at_once, chosen.length);
  where.textContent = chosen.length ? `${at + 1} to ${last} of ${chosen.length}` : "none";
  back.disabled = at === 0;
  on.disabled = last >= chosen.length;
}

function draw() {
  list.replaceChildren(...chosen.slice(at, at + data.at_once).map(article));
  tell();
}

root.addEventListener("change", (event) => {
  const [, outcome, number] = /^f-([a-z]+)(?:-(\d+))?$/.exec(event.target.className);
  const wanted = data.outcomes.indexOf(outcome);
  chosen = number === undefined ? data.cases : data.cases.filter((one) => one[4][number] === wanted);
  at = 0;
  draw();
});
list.after(make("p", {class: "turn"}, back, where, on));
tell();
})();
