// Paints a mask over a photo. From the server: value = {photo, mask}, data URIs or null. To the server: value = {painted}, a PNG of
// the photo's size, opaque where the object is; null: not touched, the server knows the mask.
const [image, canvas, brush] = ["img", "canvas", "input"].map((name) => element.querySelector(name));
const [paint, erase, box, undo, clear] = element.querySelectorAll("button");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const COLOUR = "rgb(230, 159, 0)";
let tool = paint; // or erase, box
let first = null; // where the pen went down
let last = null; // where the pen is, while it is down
let before = []; // what was painted before each stroke, for undo

function load() {
	const { photo, mask } = props.value ?? {};
	if (photo === undefined) return; // what we said ourselves
	before = [];
	choose(paint);
	if (!photo) return image.removeAttribute("src");
	image.onload = () => {
		canvas.width = image.naturalWidth;
		canvas.height = image.naturalHeight;
		canvas.parentElement.style.width = `min(100%, ${(340 * canvas.width) / canvas.height}px)`; // at most 340 pixels high
		if (!mask) return;
		const drawn = new Image();
		drawn.onload = () => pen.drawImage(drawn, 0, 0);
		drawn.src = mask;
	};
	image.src = photo;
}

function at(event) {
	const shown = canvas.getBoundingClientRect();
	return [((event.clientX - shown.left) * canvas.width) / shown.width, ((event.clientY - shown.top) * canvas.height) / shown.height];
}

function stroke(event) {
	const here = at(event);
	pen.globalCompositeOperation = tool === erase ? "destination-out" : "source-over";
	if (tool === box) {
		pen.putImageData(before[before.length - 1], 0, 0); // without the box of a moment ago
		pen.fillStyle = COLOUR;
		pen.fillRect(...first, here[0] - first[0], here[1] - first[1]);
		last = here;
		return;
	}
	pen.strokeStyle = COLOUR;
	pen.lineCap = "round";
	pen.lineWidth = (Math.max(canvas.width, canvas.height) * brush.value) / 100;
	pen.beginPath();
	pen.moveTo(...last);
	pen.lineTo(...here);
	pen.stroke();
	last = here;
}

function remember() {
	before = [...before.slice(-19), pen.getImageData(0, 0, canvas.width, canvas.height)];
}

function tell() {
	props.value = { painted: canvas.toDataURL("image/png") };
}

function choose(button) {
	tool = button;
	for (const other of [paint, erase, box]) other.setAttribute("aria-pressed", other === tool);
}

canvas.addEventListener("pointerdown", (event) => {
	if (event.button !== 0 || !image.getAttribute("src")) return;
	event.preventDefault();
	canvas.setPointerCapture(event.pointerId);
	remember();
	first = last = at(event);
	stroke(event);
});
canvas.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => {
	if (last) tell();
	last = null;
});
for (const button of [paint, erase, box]) button.addEventListener("click", () => choose(button));
undo.addEventListener("click", () => {
	if (!before.length) return;
	pen.putImageData(before.pop(), 0, 0);
	tell();
});
clear.addEventListener("click", () => {
	remember();
	pen.clearRect(0, 0, canvas.width, canvas.height);
	tell();
});
watch("value", load);
load();
