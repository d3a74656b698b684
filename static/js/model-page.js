/* The model's page: the copy button of the model card. */

import { bindDialogs, showTools } from "./task-dialogs.js";

showTools();
bindDialogs();
