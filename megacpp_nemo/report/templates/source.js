"use strict";
const { first, starts, ids, channels, keys } = JSON.parse(document.getElementById("data").textContent);
const source = document.querySelector(".source");
const tokens = source.children;
const detail = document.querySelector(".detail");
const titles = {};
let chosen = -1;

for (const option of document.querySelectorAll(".channels input")) {
  titles[option.value] = option.parentElement.textContent.trim();
  option.addEventListener("change", () => paint(option.value));
  // A browser keeps what was chosen when a page is loaded again.
  if (option.checked && !option.defaultChecked) paint(option.value);
}

function paint(channel) {
  channels[channel].forEach((id, at) => { tokens[at].className = keys[channel][id][0]; });
  if (chosen >= 0) tokens[chosen].classList.add("chosen");
  for (const legend of document.querySelectorAll(".legend")) {
    legend.hidden = legend.dataset.channel !== channel;
  }
}

function choose(at) {
  if (at === chosen || !tokens[at]) return;
  if (chosen >= 0) tokens[chosen].classList.remove("chosen");
  chosen = at;
  tokens[at].classList.add("chosen");
  const text = document.createElement("p");
  text.className = "title text";
  text.textContent = JSON.stringify(tokens[at].textContent);
  const facts = [["token", (first + at).toLocaleString("en")]];
  if (ids) facts.push(["token id", ids[at]]);
  facts.push(["byte", starts[at].toLocaleString("en")]);
  for (const name in channels) facts.push([titles[name], keys[name][channels[name][at]][1]]);
  const list = document.createElement("dl");
  for (const [name, value] of facts) {
    const pair = document.createElement("div");
    const term = document.createElement("dt");
    const said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    pair.append(term, said);
    list.append(pair);
  }
  detail.replaceChildren(text, list);
}

const place = (node) => (node.parentElement === source ? [].indexOf.call(tokens, node) : -1);
for (const event of ["pointerover", "click"]) {
  source.addEventListener(event, ({ target }) => {
    const at = place(target);
    if (at >= 0) choose(at);
  });
}
source.addEventListener("keydown", (event) => {
  const next = {
    ArrowRight: chosen + 1, ArrowLeft: Math.max(chosen - 1, 0), Home: 0, End: tokens.length - 1,
  }[event.key];
  if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(next);
  tokens[chosen].scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
});
