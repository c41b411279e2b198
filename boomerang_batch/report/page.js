"use strict";
document.documentElement.classList.add("js");
function show(pair, range) {
  pair.style.setProperty("--at", range.value + "%");
  const after = 100 - Number(range.value);
  range.setAttribute("aria-valuetext", range.value + " % before, " + after + " % after");
}
for (const group of document.querySelectorAll(".comparison")) {
  const pairs = [...group.querySelectorAll(".pair")].map((pair) => [pair, pair.querySelector("input")]);
  for (const [pair, range] of pairs) {
    const stack = pair.querySelector(".stack");
    const point = (event) => {
      if (event.buttons === 0) return;
      const box = stack.getBoundingClientRect();
      const at = Math.round(100 * (event.clientX - box.left) / box.width);
      range.value = String(at);
      show(pair, range);
      event.preventDefault();
    };
    range.addEventListener("input", () => show(pair, range));
    stack.addEventListener("pointerdown", point);
    stack.addEventListener("pointermove", point);
    stack.addEventListener("dragstart", (event) => event.preventDefault());
    show(pair, range);
  }
  const all = group.querySelector(".all input");
  const together = () => {
    show(group, all);
    for (const [pair, range] of pairs) {
      range.value = all.value;
      show(pair, range);
    }
  };
  all.addEventListener("input", together);
  show(group, all);
}
