// Says of the token under the pointer what the model gets.
const facts = JSON.parse(document.getElementById("token-facts").textContent);
const fact = document.getElementById("fact");
let marked = null;

function last(list, place) { // the last entry that begins at place or before
  let found = list[0];
  for (const entry of list) { if (entry[0] > place) break; found = entry; }
  return found;
}

function describe(place, text, h, w, image) {
  const weight = facts.weights.find((entry) => entry[0] <= place && place < entry[1]);
  const owner = last(facts.documents, place)[1];
  return "token " + place + " · id " + facts.id[place] + (text && facts.text ? " · " + JSON.stringify(text) : "") +
    "\nt " + facts.t[place] + " · h " + h + " · w " + w +
    "\ndocument " + (owner + 1) + (image === null ? "" : " · image " + (image + 1)) +
    "\n" + (weight ? "trained on, weight " + weight[2] : "not trained on");
}

function show(text, x, y) {
  fact.textContent = text;
  fact.style.display = "block";
  const left = Math.min(Math.max(x - fact.offsetWidth / 2, 12), innerWidth - fact.offsetWidth - 12);
  const above = y - fact.offsetHeight - 18;
  fact.style.left = left + "px";
  fact.style.top = (above > 8 ? above : y + 22) + "px";
}

function hide() {
  fact.style.display = "none";
  if (marked) { marked.classList.remove("on"); const cell = marked.querySelector("b"); if (cell) cell.style.display = "none"; }
  marked = null;
}

function point(event) {
  const token = event.target.closest("[n]");
  if (token !== marked) hide();
  if (!token) return;
  marked = token;
  const first = Number(token.getAttribute("n"));
  if (!token.classList.contains("frame")) {
    token.classList.add("on");
    const box = token.getClientRects()[0];
    const text = token.hasAttribute("part") ? "" : token.textContent; // a part of the character before
    show(describe(first, text, 0, 0, null), box.left + box.width / 2, box.top);
    return;
  }
  const box = token.querySelector("img").getBoundingClientRect();
  const rows = Number(token.getAttribute("rows")), columns = Number(token.getAttribute("columns"));
  const h = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
  const w = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
  const cell = token.querySelector("b"), height = box.height / rows, width = box.width / columns;
  Object.assign(cell.style, { display: "block", left: w * width + "px", top: h * height + "px", width: width + "px", height: height + "px" });
  show(describe(first + h * columns + w, "", h, w, facts.images.indexOf(first)), event.clientX, event.clientY);
}

document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("pointerleave", hide);
document.addEventListener("scroll", hide, { passive: true });
