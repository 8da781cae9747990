#!/usr/bin/env bash
# One attempt at a stage: attempt.sh NUMBER LOG COMMAND. Its lines go to the terminal and to LOG.
# A stage that stopped at its time limit (exit 75) has its state saved and may be started again; after any other
# failure a further attempt would only fail again, so it ends at once with the code of the one before, and puts back the
# log, which Snakemake removes before each attempt.
set -uo pipefail
number=$1 log=$2 command=$3
outcome=${log%.log}.exit said=${log%.log}.said
if [ "$number" -gt 1 ]; then
    before=$(cat "$outcome" 2>/dev/null || echo 1)
    if [ "$before" != 75 ]; then
        cp "$said" "$log" 2>/dev/null
        echo "not tried again: the attempt before ended with $before, and only 75 asks for another" >&2
        exit "$before"
    fi
fi
rm -f "$outcome" "$said"
bash -c "$command" 2>&1 | tee -i "$log"
code=${PIPESTATUS[0]}
[ "$code" = 0 ] || cp "$log" "$said"
echo "$code" > "$outcome"
exit "$code"
