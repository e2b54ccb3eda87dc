// The answer, word by word. The word that is pointed at, chosen, or last while the answer grows shows where it looked.

const find = (selector) => element.querySelector(selector);
const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;
const ALL = -1;
let chosen = null, pointed = null; // numbers of words, or ALL

function decode(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

// A span in the role of a button: a long word breaks as text does.
function choice(number) {
  const made = document.createElement("span");
  made.role = "button";
  made.tabIndex = 0;
  const choose = () => { chosen = chosen === number ? null : number; show(); };
  const point = (at) => { pointed = at; show(); };
  made.addEventListener("click", choose);
  made.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); }
  });
  made.addEventListener("pointerenter", () => point(number));
  made.addEventListener("pointerleave", () => point(null));
  made.addEventListener("focus", () => made.matches(":focus-visible") && point(number));
  made.addEventListener("blur", () => point(null));
  return made;
}

function draw() {
  const words = props.value?.words ?? [];
  const box = find(".words");
  // Words in place stay, so that the pointer on one of them stays on it.
  while (box.childNodes.length > 2 * words.length) box.lastChild.remove();
  if (!words.length) chosen = pointed = null;
  words.forEach((word, number) => {
    const text = word.text.trimStart();
    if (2 * number >= box.childNodes.length) box.append("", choice(number));
    const [space, made] = [box.childNodes[2 * number], box.childNodes[2 * number + 1]];
    space.data = word.text.slice(0, word.text.length - text.length);
    if (made.textContent !== text) made.textContent = text;
  });
  find(".card").classList.toggle("running", Boolean(props.value?.running));
  find(".note").textContent = props.value?.note ?? "";
  find(".tools").hidden = !props.value?.all?.levels;
  show();
}

function show() {
  const answer = props.value;
  const automatic = answer?.running ? answer.words.length - 1 : ALL;
  const number = pointed ?? chosen ?? automatic;
  const seen = number === ALL ? answer?.all : answer?.words[number];
  for (const [place, made] of [...find(".words").querySelectorAll("span").entries(), [ALL, complete]]) {
    made.classList.toggle("on", place === number);
    made.ariaPressed = place === chosen;
  }
  const heat = seen?.levels ? { levels: decode(seen.levels), top: seen.top } : null;
  const what = number === ALL ? "Entire answer" : `“${seen?.text.trim()}”`;
  find(".facts").textContent = heat ? `${what}: ${percent(seen.share)} of its attention is on the image` : "";
  document.dispatchEvent(new CustomEvent("neo-heat", { detail: heat }));
}

const complete = choice(ALL);
complete.textContent = "entire answer";
complete.classList.add("complete");
find(".tools").append(complete);

watch("value", draw);
draw();
