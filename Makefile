# Copyright: (c) 2026, The ctsync authors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Everything a person runs from a checkout. The playbooks do the work; this makes the tools that they run with.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
REPORT := reports/failover-test
NODE ?= fw1
# More for ansible-playbook: make site ARGS='--check --diff'
ARGS ?=

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Said here, too, because Ansible ignores the file in a checkout that everybody may write to.
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
LAB := -i inventories/lab/hosts.yml
DEMO_FAILED := printf '\n  %s\n  %s\n\n' 'The lab is left as it is, to look at (make lab-shell NODE=fw1). To try again: make demo.' \
	'To begin afresh, or to remove every trace: make lab-down.' >&2

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  %-16s %s\n", $$1, $$2 }'

# --- see it ---------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: root venv ## Everything: lab, both firewalls, failover test, verdict (first time some minutes)
	@echo "== 1/2  Lab and firewalls (site.yml)"
	@ansible-playbook $(LAB) site.yml || { $(DEMO_FAILED); exit 1; }
	@echo "== 2/2  Failover test, with its negative control (failover-test.yml; some minutes)"
	@rm -f $(REPORT)/report.json
	@rc=0; ansible-playbook $(LAB) failover-test.yml || rc=$$?; python3 tools/verdict.py $(REPORT) || rc=1; \
	[ $$rc = 0 ] || { $(DEMO_FAILED); }; exit $$rc

.PHONY: site
site: root venv ## Bring up the lab and deploy the pair (ARGS='--check --diff' to look first)
	ansible-playbook $(LAB) site.yml $(ARGS)

.PHONY: failover-test
failover-test: root venv ## Run the failover test on the lab
	@rc=0; ansible-playbook $(LAB) failover-test.yml $(ARGS) || rc=$$?; python3 tools/verdict.py $(REPORT) || rc=1; exit $$rc

.PHONY: lab-up
lab-up: root venv ## Bring up the lab's four nodes, nothing more
	ansible-playbook $(LAB) playbooks/lab.yml $(ARGS)

.PHONY: lab-shell
lab-shell: ## A shell on a node: make lab-shell NODE=fw2
	@node="$${CTSYNC_LAB_PREFIX:-ctsync-}$(NODE)"; tty=; [ ! -t 0 ] || tty=t; \
	docker inspect "$$node" >/dev/null 2>&1 || { \
		echo "There is no node $(NODE): NODE is one of fw1, fw2, a and b, and make lab-up starts them." >&2; exit 1; }; \
	[ "$$(docker inspect --format '{{.State.Running}}' "$$node")" = true ] || { \
		echo "$(NODE) is switched off: make site switches it on." >&2; exit 1; }; \
	exec docker exec -i$$tty "$$node" bash

.PHONY: lab-stop
lab-stop: root venv ## Remove the nodes; images and caches stay, so that lab-up takes seconds
	ansible-playbook $(LAB) playbooks/lab_down.yml -e lab_state=stopped

.PHONY: lab-down
lab-down: root venv ## Remove every trace: nodes, wires, images, caches, keys, an engine that the lab started
	ansible-playbook $(LAB) playbooks/lab_down.yml

# --- test it --------------------------------------------------------------------------------------------------------

.PHONY: test
test: lint ## All that a change has to pass (about 20 minutes)
	@echo "== molecule, sanity and artifact beside unit and integration tests: each is printed when it is done"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=line deployed daemons

# Two halves of about the same length; molecule mostly waits, and so do the integration tests.
.PHONY: deployed
deployed:
	@$(MAKE) --no-print-directory molecule
	@$(MAKE) --no-print-directory sanity
	@$(MAKE) --no-print-directory artifact

.PHONY: daemons
daemons:
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory integration

.PHONY: lint
lint: venv ## Style and types
	ruff check plugins tests tools molecule roles
	ruff format --check plugins tests tools molecule roles
	MYPYPATH=collections mypy plugins/module_utils/ctsyncd
	yamllint --strict .
	antsibull-changelog lint
	ansible-lint --offline

.PHONY: unit
unit: venv ## Unit tests
	pytest -q tests/unit

# Those that take long are left to make test-all.
WHICH ?= not long
.PHONY: integration
integration: root venv ## Integration tests in network namespaces (root); WHICH=long those that test-all adds
	sh tools/need.sh ip:iproute2 iptables-restore:iptables conntrack:conntrack keepalived:keepalived systemctl:systemd \
		vsftpd:vsftpd in.tftpd:tftpd-hpa sshd:openssh-server ssh:openssh-client conntrackd:conntrackd
	pytest -q -m "$(WHICH)" tests/integration

.PHONY: scale
scale: root venv ## Ten times 10,000 sessions, a sync link that loses 30 %, the active node cut four times (10 minutes)
	CTSYNC_SCALE=10000 CTSYNC_REPEAT=10 pytest -q tests/integration/test_scale.py

BENCH ?= default
.PHONY: bench
bench: root venv ## ctsyncd and conntrackd side by side: BENCH=quick, default (20 minutes) or full; DOCS=yes (docs/performance.md)
	sh tools/need.sh ip:iproute2 iptables-restore:iptables conntrack:conntrack conntrackd:conntrackd cc:gcc
	@[ -e /usr/include/stdio.h ] || sh tools/need.sh libc6-dev linux-libc-dev
	@/usr/bin/python3 -I -c 'import cryptography' 2>/dev/null || sh tools/need.sh python3-cryptography
	PYTHONPATH=collections:tests python3 -m bench --size $(BENCH) $(if $(DOCS),--output docs)

SEED ?= 1
MINUTES ?= 10
.PHONY: soak
soak: root venv ## Random faults from a seed: make soak SEED=7 MINUTES=60; PLAN=yes shows them, CONTROL=yes must lose all (docs/soak.md)
	sh tools/need.sh ip:iproute2 iptables-restore:iptables conntrack:conntrack keepalived:keepalived
	PYTHONPATH=collections:tests python3 -m soak --seed $(SEED) --minutes $(MINUTES) $(if $(PLAN),--plan) $(if $(CONTROL),--control) $(ARGS)

.PHONY: test-all
test-all: test scale platforms three ## make test, and what takes longer
	$(MAKE) integration WHICH=long
	$(MAKE) soak CONTROL=yes
	$(MAKE) soak MINUTES=10

INPUTS ?= $(if $(SECONDS),,200000)
.PHONY: fuzz
fuzz: venv ## Fuzz the parsers of foreign bytes: make fuzz SECONDS=600, or INPUTS=10000000; SEED=1 (docs/fuzzing.md)
	PYTHONPATH=collections:tests python3 -m fuzz --seed $(SEED) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(INPUTS),--inputs $(INPUTS))

# Where the built collection is installed; the scenarios deploy that. (By hand, 'molecule converge' deploys the checkout.)
ARTIFACT := .cache/artifact
.PHONY: install-artifact
install-artifact: venv
	@sh tools/artifact.sh install $(ARTIFACT)

.PHONY: molecule
molecule: root venv install-artifact ## The molecule scenario, with the installed artifact: deploy, deploy again, verify, fail over, verify
	CTSYNC_COLLECTIONS=$(ARTIFACT) molecule test

.PHONY: platforms
platforms: root venv install-artifact ## The molecule scenario on Debian 11 and on Debian 13 (the default is 12)
	CTSYNC_COLLECTIONS=$(ARTIFACT) molecule test -s debian11
	CTSYNC_COLLECTIONS=$(ARTIFACT) molecule test -s debian13

.PHONY: three
three: root venv ## Three firewalls by the playbooks: hand-over from one to the next, another key, with a session open
	molecule test -s three

.PHONY: artifact
artifact: venv ## Build the collection, install it elsewhere, check that its playbooks parse
	sh tools/artifact.sh

.PHONY: sanity
sanity: venv ## ansible-test's sanity tests on the built collection
	sh tools/artifact.sh sanity

# --- build it -------------------------------------------------------------------------------------------------------

.PHONY: ctsyncd
ctsyncd: ## Write the daemon as one file, dist/ctsyncd, for people without Ansible
	python3 tools/build_zipapp.py dist/ctsyncd

.PHONY: venv
venv: ## The tools, pinned, in .venv and .vendor
	@sh tools/venv.sh

.PHONY: clean
clean: ## Remove reports, builds and tool caches; the lab and the tools stay
	rm -rf dist reports .ansible .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/output ctsync-ha_firewall-*.tar.gz
	find plugins tests tools molecule roles -name __pycache__ -type d -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## The same, and the tools
	rm -rf .venv .vendor

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "This makes network namespaces and containers: run it as root." >&2; exit 1; }
