// Tells the number behind a cell of a strip; the page is complete without it.
(() => {
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const tip = document.getElementById("tip");
  const show = (event) => {
    const strip = event.target.closest && event.target.closest("img.strip");
    tip.hidden = !strip;
    if (!strip) return;
    const [layer, reading, kind] = strip.dataset.at.split(",").map(Number);
    const [gain, shift] = numbers[layer][reading];
    const box = strip.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * strip.naturalWidth);
    const row = Math.floor((event.clientY - box.top) / box.height * strip.naturalHeight);
    const channel = Math.max(0, Math.min(gain.length - 1, row * strip.naturalWidth + column));
    const text = (value) => (value === null ? "none, as γ is 0" : String(value).replace("-", "−"));
    tip.textContent = `channel ${channel} · ` +
      (kind === 0 ? `gain ${text(gain[channel])}` : `Δβ ${text(shift[channel])}`);
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
})();
