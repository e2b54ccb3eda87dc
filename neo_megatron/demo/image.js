// The image, and over it how much of a word's attention each of its tokens has. The page's answer says which word:
// it sends "neo-heat" with {levels, top}, or null for none.

const PALETTE = [[0, 0, 4], [51, 10, 94], [120, 28, 109], [187, 55, 84], [237, 105, 37], [251, 181, 25], [252, 255, 164]];
const COLOURS = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * (PALETTE.length - 1);
  const below = Math.min(Math.floor(place), PALETTE.length - 2);
  return PALETTE[below].map((value, channel) => value + (place - below) * (PALETTE[below + 1][channel] - value));
});
const find = (selector) => element.querySelector(selector);
const canvas = find("canvas"), image = find("img"), tip = find(".tip");
const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;
let heat = null, bare = false;

function drawImage() {
  const view = props.value;
  heat = null;
  find(".empty").hidden = Boolean(view?.address);
  find(".shown").hidden = !view?.address;
  find(".refused").textContent = view?.refused ?? "";
  if (view?.address) {
    image.src = view.address;
    image.alt = view.name;
    find(".facts").textContent = view.facts;
    [canvas.height, canvas.width] = view.grid;
    const ratio = canvas.width / canvas.height;
    find(".frame").style.cssText = `aspect-ratio: ${ratio}; max-width: ${70 * ratio}vh`; // all of it fits the screen
  }
  drawHeat();
}

function drawHeat() {
  find(".scale").hidden = !heat;
  canvas.hidden = !heat || bare;
  find(".bare").textContent = bare ? "show the heat map" : "hide the heat map";
  if (!heat) return;
  const pixels = new ImageData(canvas.width, canvas.height);
  heat.levels.forEach((level, cell) => pixels.data.set([...COLOURS[level], 120 + level * 0.2], 4 * cell));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  find(".top").textContent = percent(heat.top);
}

find(".bare").addEventListener("click", () => { bare = !bare; drawHeat(); });

document.addEventListener("neo-heat", (event) => {
  heat = event.detail && event.detail.levels.length === canvas.width * canvas.height ? event.detail : null;
  drawHeat();
});

find(".frame").addEventListener("pointermove", (event) => {
  const box = canvas.getBoundingClientRect();
  const column = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const row = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const level = heat?.levels[row * canvas.width + column];
  tip.hidden = level === undefined || column < 0 || column >= canvas.width;
  if (tip.hidden) return;
  tip.textContent = `row ${row + 1}, column ${column + 1}: ${percent((level / 255) * heat.top)}`;
  tip.style.left = `${event.clientX - box.left}px`;
  tip.style.top = `${event.clientY - box.top}px`;
});
find(".frame").addEventListener("pointerleave", () => (tip.hidden = true));

// An image may be dropped or pasted anywhere on the page; the button's own input uploads it. Text goes where it goes.
function take(files) {
  const input = document.querySelector("input[type=file]");
  const one = new DataTransfer();
  one.items.add(files[0]);
  input.files = one.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
}
function dragged(event, inside) {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  find(".panel").classList.toggle("over", inside);
}
document.addEventListener("dragover", (event) => dragged(event, true));
document.addEventListener("dragleave", (event) => dragged(event, event.relatedTarget !== null));
document.addEventListener("drop", (event) => {
  dragged(event, false);
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});

watch("value", drawImage);
drawImage();
