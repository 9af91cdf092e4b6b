"use strict";
function show(cell, cells, detail) {
  for (const other of cells) other.classList.toggle("chosen", other === cell);
  const title = document.createElement("p");
  title.className = "title";
  title.textContent = cell.getAttribute("aria-label");
  const figures = cell.parentElement.querySelector(".more").cloneNode(true);
  figures.hidden = false;
  detail.replaceChildren(title, figures);
}

// One stop for the Tab key in each strip; arrows move within it.
for (const strip of document.querySelectorAll(".strip")) {
  const own = [...strip.querySelectorAll(".cell")];
  own.forEach((cell, at) => {
    cell.tabIndex = at ? -1 : 0;
    for (const event of ["mouseenter", "focus", "click"]) {
      cell.addEventListener(event, () => show(cell, own, strip.nextElementSibling));
    }
    cell.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -at, End: own.length - 1 - at };
      const next = own[at + (steps[event.key] ?? 0)];
      if (!(event.key in steps) || !next) return;
      event.preventDefault();
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
}

const copy = document.getElementById("copy");
if (copy) {
  const line = document.getElementById("line");
  const said = document.getElementById("copied");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(line.textContent);
      said.textContent = "Copied.";
    } catch {
      // Without leave to write to the clipboard, the command is at least marked for the keyboard.
      getSelection().selectAllChildren(line);
      said.textContent = "Marked: copy it with the keyboard.";
    }
  });
}

addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
