/* The page of one task: puts feed, charts, status, log and dialogs together. */

import { ChartBoard } from "./chart-board.js";
import { bindDialogs, showTools } from "./task-dialogs.js";
import { TaskFeed } from "./task-feed.js";
import { TaskLog } from "./task-log.js";
import { TaskStatus } from "./task-status.js";

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const boot = read("task-boot");
const fileName = boot.name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "task";

showTools();
bindDialogs();
const board = new ChartBoard(read("task-figures"), fileName);
const status = new TaskStatus(boot.state, board.store, boot.now);
const log = new TaskLog(boot.log, boot.state.terminal);
const feed = new TaskFeed(boot);

const pill = document.getElementById("live-pill");
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const LABELS = {
  live: () => "Live",
  catching: () => "Catching up",
  offline: (since) => `Offline since ${clock.format(since)}`,
  ended: () => "Ended",
  gone: () => "No longer available: the task was deleted or you were signed out",
};
feed.addEventListener("mode", ({ detail: { name, since } }) => {
  pill.dataset.live = name;
  pill.textContent = LABELS[name](since);
});
feed.addEventListener("frame", ({ detail }) => {
  if (detail.points.length) board.add(detail.points);
  status.take(detail);
  if (detail.state) log.follow(detail.state.terminal);
});
feed.start();
