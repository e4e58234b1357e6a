// Tooltips for fingers and keyboards; without this script browsers show the marks' titles.
(function () {
  "use strict";
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.appendChild(tip);
  let current = null;

  function hide() {
    if (current) current.classList.remove("on");
    current = null;
    tip.hidden = true;
  }

  function place() {
    const mark = current.getBoundingClientRect();
    const own = tip.getBoundingClientRect();
    const middle = mark.left + mark.width / 2 - own.width / 2;
    const above = mark.top - own.height - 8;
    tip.style.left = Math.max(Math.min(middle, innerWidth - own.width - 8), 8) + "px";
    tip.style.top = (above >= 8 ? above : mark.bottom + 8) + "px";
    if (mark.bottom < 0 || mark.top > innerHeight) hide();
  }

  function show(mark, byKeyboard) {
    hide();
    current = mark;
    if (byKeyboard) mark.classList.add("on");
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    place();
  }

  document.querySelectorAll(".mark > title").forEach((title) => title.remove());
  document.querySelectorAll(".panel svg").forEach((svg) => {
    const marks = Array.from(svg.querySelectorAll(".mark"));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step || !marks.length) return;
      event.preventDefault();
      const at = marks.indexOf(current);
      const first = step > 0 ? 0 : marks.length - 1;
      const next = marks[at < 0 ? first : (at + step + marks.length) % marks.length];
      next.scrollIntoView({ block: "nearest" });
      show(next, true);
    });
    svg.addEventListener("blur", hide);
    svg.addEventListener("pointerover", (event) => {
      const mark = event.target.closest(".mark");
      if (mark) show(mark, false);
      else hide();
    });
    svg.addEventListener("pointerleave", hide);
  });
  addEventListener("scroll", () => { if (current) place(); }, { passive: true });
})();
