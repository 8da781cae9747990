from pipestill.cli import main

raise SystemExit(main())
