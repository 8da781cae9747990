#!/usr/bin/env bash
# One attempt at a stage: attempt.sh NUMBER LOG COMMAND. Its lines go to the terminal, to LOG and to a log of this attempt
# alone in a folder beside LOG, which stays when Snakemake removes LOG before the next attempt.
# A stage that stopped, was killed or lost a rank is tried again and goes on from its saved state. Wrong input (exit 2) is
# not, and after two attempts in a row that saved nothing further ones end at once: they would only do the same.
# What is wrong with an input goes to the logs only; whoever started the run shows it once, at the end.
set -uo pipefail
number=$1 log=$2 command=$3
folder=${log%.log}
outcome=$folder/outcome futile=$folder/futile before=$folder/before last=$folder/number given_up=$folder/given-up
export PIPESTILL_STATE=$folder/state PIPESTILL_ATTEMPT=$number PIPESTILL_LOG=$folder/$(date -u +%Y%m%dT%H%M%S)-$number
export PIPESTILL_WRONG=$folder/wrong
mkdir -p "$folder"

saved() { # names and sizes of what the stage has saved to go on from; it notes in the file `state` where that lies
    find "$(cat "$PIPESTILL_STATE" 2>/dev/null || echo /nowhere)" -type f ! -name '.*' -printf '%P %s\n' 2>/dev/null | sort
}

give_up() {
    kept=$(cd "$folder" && ls ./*.log 2>/dev/null | grep -v -e -rank- | tail -1)
    [ -z "$kept" ] || cp "$folder/$kept" "$log"
    if [ "$2" = 2 ] || [ -e "$given_up" ]; then
        echo "not tried again: $1" >> "$log"
    else
        echo "not tried again: $1" >&2
        touch "$given_up"
    fi
    exit "$2"
}

known=$(cat "$last" 2>/dev/null)
echo "$number" > "$last"
count=0
if [ "$number" = 1 ] || [[ $known != "$number" && $known != $((number - 1)) ]]; then
    rm -f "$PIPESTILL_STATE" # what lies here is of an earlier series: an attempt that could not be submitted leaves a gap
else
    code=$(cat "$outcome" 2>/dev/null)
    code=${code:-3} # killed, or a full disk: nobody wrote it down
    [ "$(saved)" != "$(cat "$before" 2>/dev/null)" ] || count=$(cat "$futile" 2>/dev/null)
    count=${count:-0}
    [ "$code" != 2 ] || give_up "the attempt before ended with 2, wrong input" 2
    [ "$count" -lt 2 ] ||
        give_up "two attempts in a row saved nothing to go on from, the last ended with $code: see the logs in $folder" "$code"
fi
echo $((count + 1)) > "$futile"
saved > "$before"
rm -f "$outcome" "$given_up" "$PIPESTILL_WRONG"

trap : TERM INT USR2 # the stage has had them too, and its end is waited for
bash -c "$command" 2>&1 | (trap '' TERM INT USR2 && exec tee "$log" "$PIPESTILL_LOG.log")
code=${PIPESTATUS[0]}
[ ! -e "$PIPESTILL_WRONG" ] || tee -a "$log" "$PIPESTILL_LOG.log" < "$PIPESTILL_WRONG" > /dev/null
[ "$(saved)" = "$(cat "$before" 2>/dev/null)" ] || echo 0 > "$futile"
echo "$code" > "$outcome"
exit "$code"
