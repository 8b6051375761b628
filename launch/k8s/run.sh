#!/bin/bash
# What a pod runs: torchrun with the arguments given, which have the run's --out=FOLDER among them.
#
# When one pod is evicted, the run saves and the ranks of all pods end with status 0. A pod whose run
# has not come to its end must not count as completed: it ends with status 75, and is made anew.
set -euo pipefail

out=
for argument; do
    [[ $argument != --out=* ]] || out=${argument#--out=}
done
: "${out:?give the run --out=FOLDER}"

# A start that finds the run finished touches it.
summary() { stat -c '%i %y %s' "$out/summary.json" 2> /dev/null || true; }

# Kubernetes tells the first process of the container alone. torchrun is told once: a third signal
# would end it before its ranks.
is_told= is_passed_on= launcher=
pass_on() {
    [[ -n $launcher && -z $is_passed_on ]] || return 0
    is_passed_on=1
    kill -s TERM "$launcher" || true
}
trap 'woken=1 is_told=1; pass_on' TERM

# What an earlier run has left is no end of this one.
old_summary=$(summary)

[[ -z $is_told ]] || exit 75
torchrun "$@" &
launcher=$!
[[ -z $is_told ]] || pass_on
until
    woken=
    status=0
    wait "$launcher" || status=$?
    [[ -z $woken ]]
do :; done

if [[ $status != 0 && -z $is_told ]]; then
    exit "$status"
fi
# A file that another pod has written may come late over the network.
for _ in $(seq "${PATIENCE_S:-30}"); do
    [[ ! -e $out/summary.json || $(summary) == "$old_summary" ]] || exit 0
    [[ -z $is_told ]] || break
    sleep 1
done
exit 75
