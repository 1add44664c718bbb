// Speed over the last two minutes, as a line.
const SECONDS = 120;

export class SpeedLine {
  constructor(canvas) {
    this.canvas = canvas;
    this.points = [];
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  add(at_s, value) {
    this.points.push([at_s, value ?? 0]);
    this.points = this.points.filter(([then]) => at_s - then <= SECONDS);
    this.draw();
  }

  draw() {
    const scale = devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = this.canvas;
    [this.canvas.width, this.canvas.height] = [width * scale, height * scale];
    const pen = this.canvas.getContext("2d"), colour = getComputedStyle(this.canvas).getPropertyValue("--accent");
    if (this.points.length < 2) return;
    const latest = this.points.at(-1)[0], most = Math.max(1, ...this.points.map(([, value]) => value));
    const spots = this.points.map(([then, value]) => [width * (1 - (latest - then) / SECONDS), height - 2 - (height - 4) * value / most]);
    pen.scale(scale, scale);
    pen.beginPath();
    for (const spot of spots) pen.lineTo(...spot);
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = 2;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(width, height);
    pen.lineTo(spots[0][0], height);
    pen.globalAlpha = 0.15;
    pen.fill();
  }
}
