// Slash commands: what there is, and what a typed line means. What they do is the app's.

/** `run(argument, app)` returns a sentence to show, or nothing. */
export const COMMANDS = [
  { name: "new", help: "Begin a new conversation", run: (_, app) => app.begin() },
  { name: "retry", help: "Write the last reply again", run: (_, app) => app.regenerate() },
  {
    name: "system",
    argument: "TEXT",
    help: "Set the system prompt; empty removes it",
    run: (text, app) => app.system(text),
  },
  { name: "temp", argument: "X", help: "Temperature; 0 always takes the likeliest token", run: number("temperature") },
  { name: "topk", argument: "N", help: "Choose among the N likeliest tokens", run: number("top_k") },
  {
    name: "topp",
    argument: "X",
    help: "Choose among the likeliest tokens that make up X of the probability",
    run: number("top_p"),
  },
  { name: "max", argument: "N", help: "Longest reply, in tokens", run: number("max_tokens") },
  { name: "seed", argument: "N", help: "The same seed gives the same reply; empty is random", run: number("seed") },
  {
    name: "export",
    argument: "md|json",
    help: "Save this conversation to a file",
    run: (format, app) => app.export(format || "md"),
  },
  { name: "help", help: "Commands and keys", run: (_, app) => app.help() },
];

function number(setting) {
  return (text, app) => app.set(setting, text === "" ? null : Number(text));
}

/**
 * What a line in the box means: {command, argument}, {unknown: name}, or null for a message.
 * Only one lower-case word counts as a command, so that "/etc/hosts" is a message; a message that starts like a
 * command is written with two slashes.
 */
export function parseCommand(line) {
  const match = /^\/([a-z]+)(?:\s+([\s\S]*))?$/.exec(line.trim());
  if (!match) return null;
  const command = COMMANDS.find(({ name }) => name === match[1]);
  return command ? { command, argument: (match[2] ?? "").trim() } : { unknown: match[1] };
}

/** The commands that begin like what has been typed, while its name is being typed. */
export function suggestions(line) {
  const match = /^\/([a-z]*)$/.exec(line);
  return match ? COMMANDS.filter(({ name }) => name.startsWith(match[1])) : [];
}
